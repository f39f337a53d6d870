"""The latency of candidates: some networks are measured, here or on another device, and the others predicted."""
