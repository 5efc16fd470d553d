"""What a set of sites costs in bytes and step time."""
