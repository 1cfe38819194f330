"""Query models and baselines."""
