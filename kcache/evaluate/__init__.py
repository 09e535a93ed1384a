"""How close decoding with N rows comes to full attention: what a model says, and how sure it is of it."""
