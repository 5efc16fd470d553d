"""What a set of sites costs in bytes and in step time."""
