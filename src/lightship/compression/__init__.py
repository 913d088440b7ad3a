"""Checkpoint → lighter checkpoint, without training; one step a file."""
