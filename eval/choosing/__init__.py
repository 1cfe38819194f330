"""Choosing among candidate responses: schemes, labels, and the gain of a choice."""
