"""Which sites are kept: the warm-up and its rules."""
