"""Data, head and metric of each benchmark, and the embedded models and texts that need no hub."""
