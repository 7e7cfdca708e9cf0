"""The cases, each a coroutine `measure(server, size)` that returns what it found."""
