"""What a causal language model computes: attention over a layout of tokens, log-probabilities of the chosen ones."""
