"""GRPO on veRL."""
