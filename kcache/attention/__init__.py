"""What a model calls when it attends: the function registered with transformers, and what a layer leaves for it."""
