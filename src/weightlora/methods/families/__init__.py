"""What a family of methods shares: those that select, those that act while they train, those of triplets."""
