"""The reward-gradient methods, a file each: which steps of the chain get gradient, and where the reward is read.

Each is made of a solver's schedule and the run's random seed, and says with ``plan(step)`` what that optimizer step
differentiates (``rollout.plan.StepPlan``); ``objective/reward_gradient.py`` carries it out.
"""
