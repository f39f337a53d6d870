"""Search methods on recorded results: tables, a simulated search, many of them, and their summary."""
