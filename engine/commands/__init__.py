"""The commands of cli.py, a module each: `parser()` makes its flags, `run(values)` does it."""
