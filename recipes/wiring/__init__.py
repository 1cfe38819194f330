"""Helpers of the recipes: they build engines, teachers and judges from the configuration."""
