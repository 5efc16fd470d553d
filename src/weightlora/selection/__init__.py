"""Which sites are kept: scoring and its rules."""
