"""pgenrm-train: train, evaluate and scale personalised generative reward models (P-GenRM, arXiv 2602.12116)."""

__version__ = "0.1.0"
