"""Plan, preflight and launch files for a cluster."""
