"""Models by name: where they come from, what is fetched for them, and whether they can be served."""
