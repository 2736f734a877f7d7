"""Small helpers that know nothing of videos: errors, files, hashes, random draws, the console, processes, signals."""
