"""Tests of the command line, on an engine of their own."""
