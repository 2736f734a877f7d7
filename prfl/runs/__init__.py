"""What the commands do: stages of training from a config to a report, evaluation, samples, scores, checks."""
