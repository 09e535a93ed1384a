"""Rows of measurements: formats, files, resuming, charts, progress; shared by ``bench`` and ``eval``."""
