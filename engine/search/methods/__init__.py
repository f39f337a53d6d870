"""Search methods: pure functions of the history."""
