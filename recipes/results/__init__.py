"""Recipes that read finished runs: their results on a page or on a hub."""
