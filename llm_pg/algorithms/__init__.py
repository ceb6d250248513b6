"""The algorithms: `table` says how each differs (no torch); `algorithm` makes weights and a loss of rollouts."""
