"""Tests of what layers of a cache share."""
