"""The commands of cli.py, one module each: `parser()` returns its flags, `run(values)` runs it."""
