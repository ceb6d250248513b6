"""The mathematics of policy gradients as pure functions of tensors: no model, tokenizer, config, device or file.

Axes: B rollouts, T steps, V vocabulary. A `mask_BT` is 1 (or True) where a step was really taken by the policy.
"""
