"""The dashboard: a Textual app over a :class:`~kcache.watch.source.Source`, live or recorded."""
