"""Tests of the verdicts on architectures."""
