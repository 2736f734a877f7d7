"""Config to objects, a file for each section: the one place where a string picks a class.

What is done with the objects is in prfl.runs.
"""
