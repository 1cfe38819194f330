"""Test-time user-based scaling."""
