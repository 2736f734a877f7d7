"""Training: the loop, checkpoints, the average of the weights, guards and the log."""
