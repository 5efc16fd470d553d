"""The plan: site → rank, its file, its budget, and the PEFT config made of it."""
