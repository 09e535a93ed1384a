"""Tests of the four verbs and of exact attention, on a CPU."""
