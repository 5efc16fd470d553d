"""The fast LoRA step."""
