"""The chain: convention, solvers, guidance, plans of where gradient flows, what they ask of a rollout, the adjoint."""
