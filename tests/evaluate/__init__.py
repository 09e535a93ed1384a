"""Tests of the evaluation of fidelity."""
