"""Checks of the machine and of the network before a stage starts."""
