"""Tests of measuring a machine and judging it."""
