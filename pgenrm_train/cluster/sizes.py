"""Sizes that an engine works with and the planner counts."""

# Logits that PSI's loss makes at a time: 256 MiB in float32, 523 tokens of a vocabulary of 128,256.
PIECE = 2**26
