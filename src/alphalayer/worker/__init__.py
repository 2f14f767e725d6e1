"""The processes that draw: the supervisor, the engine process, and what they say to each other."""
