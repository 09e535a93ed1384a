"""Tests of models by name and of what their forwards take."""
