"""What ``kcache bench`` does with rows: formats, files, resuming, comparing, plots."""
