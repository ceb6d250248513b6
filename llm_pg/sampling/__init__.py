"""Engines that sample completions, behind one protocol.

`native` is the trainer's own weights; `rollout/sampler.py` asks an engine for the completions of a batch of prompts.
"""
