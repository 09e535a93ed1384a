"""The commands of ``kcache eval``, and how their rows are written and drawn."""
