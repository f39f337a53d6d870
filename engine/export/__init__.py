"""A trained architecture as files that need nothing of ours."""
