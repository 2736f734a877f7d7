"""Manifests and prompts, video files, the latent cache, data sets in memory, and the shapes world."""
