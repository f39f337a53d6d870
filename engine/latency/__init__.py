"""Latency as it is measured: networks in the form that is deployed, timed in rounds, here or on another device."""
