"""The parts of ``kcache generate``: reading prompts, planning batches, the journal, running."""
