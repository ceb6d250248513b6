"""What a causal language model computes: attention over a layout of tokens, log-probabilities of the chosen ones.

A model is saved by `run/saving/model_writer.py`.
"""
