"""The sampling chain: its convention, solvers, guidance, plans, the rollout and what plans need of it, the adjoint."""
