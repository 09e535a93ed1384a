"""Watching a cache at work: frames of what it does, published to viewers, recorded, replayed."""
