"""CogVideoX, text to video: v-prediction on a variance-preserving path, one attention over text and video."""
