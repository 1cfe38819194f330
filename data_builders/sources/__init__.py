"""Sources of preference data."""
