"""Checks of built data."""
