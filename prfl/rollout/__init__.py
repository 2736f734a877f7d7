"""The chain: its convention, solvers, guidance, plans of where gradient flows, and the walk back along them."""
