"""What a cache is made of: its layers, what they share, which keep V on the device, how many rows each fetches."""
