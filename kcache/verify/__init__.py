"""Whether kcache is right for an architecture: a tiny model of the real class, compared with stock transformers."""
