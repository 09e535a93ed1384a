"""Timing decode steps: KCache beside the caches of transformers, in one process, on the loop that generation runs.

``spec`` says what is asked for, ``cases`` what is measured, ``engines`` who is, ``context`` puts a past into their
caches, ``runner`` times one engine in one case, ``run`` goes through all cases, engines taking turns, ``rows`` is what
comes out. ``floor`` says what a step cannot do without, ``fidelity`` what TopN costs in answers.
"""
