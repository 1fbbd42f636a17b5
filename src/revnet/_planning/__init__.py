"""From a memory budget to the fastest execution of every step."""
