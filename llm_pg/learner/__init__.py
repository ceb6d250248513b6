"""The policy in training: weights, adapters, critic, shards, and the update that sums what an algorithm weighed."""
