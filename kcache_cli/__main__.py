"""``python -m kcache_cli`` is ``kcache``."""

from kcache_cli.app import main

if __name__ == "__main__":
    main()
