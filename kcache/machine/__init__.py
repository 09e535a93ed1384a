"""What there is to run on: devices, memory, and how fast bytes move."""
