"""The dashboard's panels. Each draws one part of a :class:`~kcache_cli.tui.model.moment.Moment`."""
