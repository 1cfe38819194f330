"""The scoring service of a configuration: its parts and its servers."""
