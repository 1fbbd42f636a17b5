"""What a replay must see again, one file for each kind of state."""
