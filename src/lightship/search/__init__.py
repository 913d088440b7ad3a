"""A budget, and the best that is found within it."""
