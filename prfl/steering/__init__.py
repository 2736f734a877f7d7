"""Choosing and steering samples while they are drawn: several chains of a video are looked at on the way.

A method is a file with one class: its settings, and ``method(process)``, which gives a ``Steered``.  ``Process`` steps
chains with any of prfl.rollout's solvers, reads scores at nodes, and counts network calls.  To read first: best_of.py.
"""
