"""Evaluations, scaling studies and probes."""
