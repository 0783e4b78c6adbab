"""The training engine: packed policies, samplers, the reinforcement loop, and the systems on it."""
