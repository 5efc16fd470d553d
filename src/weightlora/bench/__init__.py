"""Measurements: runs → records (one JSON line each) → tables."""
