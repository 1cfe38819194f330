"""The run folder: manifest, tracking, store."""
