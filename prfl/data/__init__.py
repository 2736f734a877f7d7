"""Manifests and prompts, video files, the latent cache, and data sets in memory."""
