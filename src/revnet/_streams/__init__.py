"""How streams are held between steps, and the arithmetic of a step on them."""
