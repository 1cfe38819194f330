"""Recipes that choose among responses with a trained model."""
