"""The driver of a search: what to try next, and what is known. It never imports torch, so it starts at once."""
