"""Tests of kcache and kcache_cli."""
