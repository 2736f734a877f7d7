"""Helpers for all packages: errors, files, hashes, random draws, the console, processes, signals, decoding."""
