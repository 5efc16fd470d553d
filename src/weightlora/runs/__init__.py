"""Recipes, and what runs them."""
