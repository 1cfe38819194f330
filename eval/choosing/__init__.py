"""Choosing among candidate responses: schemes, labels, and what a choice gains."""
