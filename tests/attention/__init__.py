"""Tests of attaching models, and of what is asked of them."""
