"""Stable Video Diffusion, from a picture alone."""
