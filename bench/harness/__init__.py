"""Benchmarks: providers of one thing timed in turn, their memory in processes of their own, tables of the files.

``pytest --benchmark`` runs them (bench/prfl_bench.py), ``python -m bench`` shows what it wrote.  A case is declared in
``problem``; the kernels' are in ``kernel_cases``.
"""
