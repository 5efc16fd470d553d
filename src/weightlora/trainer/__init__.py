"""Methods on a transformers trainer."""
