"""SFT on DeepSpeed."""
