"""Measurement and verdict of gpu_check."""
