"""Benchmarks and studies.  They need the checkout: nothing of an installed prfl imports them."""
