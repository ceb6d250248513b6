"""Weights, gradients and moments in parts over the ranks: FSDP2 and DeepSpeed's ZeRO."""
