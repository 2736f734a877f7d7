"""The chain: its convention, solvers, guidance, plans of where gradient flows, what they need of a rollout, and the adjoint."""
