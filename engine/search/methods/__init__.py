"""Search methods: what to try next, as pure functions of the history, and which architecture to recommend."""
