"""Timing decode steps: KCache beside the caches of transformers, in one process, on the loop that generation runs.

``cases`` says what is measured, ``engines`` who is, ``context`` puts a past into their caches, ``race`` times one
case with the engines taking turns, ``run`` goes through all cases, ``rows`` is what comes out. ``floor`` says what a
step cannot do without, ``fidelity`` what TopN costs in answers.
"""
