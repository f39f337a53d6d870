"""A trained architecture as files that work without this program."""
