"""Memory, time and cost of a run, without starting it."""
