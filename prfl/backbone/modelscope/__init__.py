"""ModelScope's text-to-video UNet: it predicts the noise on a variance-preserving path, and its VAE takes images."""
