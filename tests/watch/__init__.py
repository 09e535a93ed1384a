"""Tests of publishing, attaching, recording."""
