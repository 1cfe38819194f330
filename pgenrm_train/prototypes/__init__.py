"""User prototypes: clusters and their refinement."""
