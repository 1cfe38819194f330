"""Evaluations on benchmarks that are not votes, and several tasks in one table."""
