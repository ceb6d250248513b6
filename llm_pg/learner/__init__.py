"""The policy in training: weights, adapters, critic, and the update that sums what an algorithm weighed."""
