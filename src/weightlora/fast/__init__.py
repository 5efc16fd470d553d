"""The LoRA step with fewer passes over memory."""
