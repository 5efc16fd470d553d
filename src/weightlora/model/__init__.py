"""Work on a torch model: sites, adapter layers, hooks, gates, checkpointing, processes, and restoring the model."""
