"""Local generation with vLLM."""
