"""The reward-gradient methods, one per file: which steps of the chain get gradient, and where the reward is read.

A method holds a solver's schedule and the run's random seed.  Its ``plan(step)`` returns what that optimizer step
differentiates (``rollout.plan.StepPlan``), and ``objective/reward_gradient.py`` carries it out.
"""
