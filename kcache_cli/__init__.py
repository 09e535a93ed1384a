"""The command line of kcache: it parses, prints and asks; the work is done by :mod:`kcache`."""
