"""The brain: what to try next and what is known. Never imports torch, so that it starts at once on a login node."""
