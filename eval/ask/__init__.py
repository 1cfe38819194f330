"""Ask models and baselines."""
