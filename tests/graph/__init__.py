"""Tests of the recorded decode step."""
