"""Ray: cluster membership, guardian of child processes, ring check."""
