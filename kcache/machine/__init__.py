"""What there is to run on: devices, memory, processes that share a model."""
