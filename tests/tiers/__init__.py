"""Tests of rows in either memory and what crosses between them."""
