"""The hard-negative curriculum: hardness, sampler, decks."""
