"""A whole decode step as one CUDA graph: captured once, replayed for every token.

``step`` is what is recorded (by :mod:`kcache.machine.tape`), ``layers`` what the model finds in place of its cache,
``fit`` says which models and caches can do it, ``fuse`` takes a model's small kernels together (``parts`` are what it
looks for, ``joint`` what makes one product of several), ``recorded`` is one recording, ``decoder`` decides from token
to token.
"""
