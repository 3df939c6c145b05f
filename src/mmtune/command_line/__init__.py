"""The command line: each command is made from the signature and the docstring of the function that it calls."""
