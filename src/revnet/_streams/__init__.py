"""Hold streams between steps, and compute a step on them."""
