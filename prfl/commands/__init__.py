"""The command line, a file for each command: its arguments and examples, and the call of what it does (prfl.runs)."""
