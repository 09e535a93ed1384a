"""How many bytes a model and its cache take, what fits, and how fast it should go."""
