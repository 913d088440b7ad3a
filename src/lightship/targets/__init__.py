"""Checkpoint → runtime folder → Engine: one runtime a file, export and engine together since both know the format."""
