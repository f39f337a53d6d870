"""Fidelity studies: how well low fidelities rank architectures, and which one to search with."""
