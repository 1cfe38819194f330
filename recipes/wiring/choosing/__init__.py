"""The model that chooses, its candidates, and what it is compared with."""
