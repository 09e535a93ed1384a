"""The parts of ``kcache chat``: one reply, the read-eval loop, slash commands, saved conversations."""
