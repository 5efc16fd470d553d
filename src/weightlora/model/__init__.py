"""What is done to a torch model without choosing anything: sites, layers, hooks, gates, and putting all back."""
