"""``kcache inspect --web``: the dashboard in a browser, on this machine only."""
