"""A run at a URL: objects, snapshots, publisher."""
