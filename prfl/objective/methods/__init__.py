"""The reward-gradient methods, a file each: which steps of the chain get gradient, and where the reward is read."""
