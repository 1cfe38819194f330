"""Prompts: history, masking and messages."""
