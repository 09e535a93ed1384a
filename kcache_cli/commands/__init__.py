"""One file per command; anything slow to import is imported inside the command."""
