"""Rules that score the sites, one file each."""
