"""The forms of ``kcache inspect`` that write something and exit."""
