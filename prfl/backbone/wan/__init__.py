"""The Wan family: the network with its kernels, its VAE, its text condition, and how a pipeline folder is loaded."""
