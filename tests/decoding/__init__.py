"""Tests of prompts on their way into a cache."""
