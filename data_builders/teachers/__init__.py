"""Rule-based teachers."""
