"""Engine + original → figures: one measurement a file."""
