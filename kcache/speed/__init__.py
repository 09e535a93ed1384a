"""How fast this machine is, or a card that is known, and what it lacks to be faster."""
