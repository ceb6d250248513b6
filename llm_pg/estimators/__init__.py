"""The mathematics of policy gradients as pure functions of tensors: no model, tokenizer, config, device or file.

`algorithms/advantages.py` and `algorithms/loss.py` put them together as an algorithm says. A value is computed by
`model/critic.py`; what is here is the loss of a critic and what it is worth.

Axes: B rollouts, T steps, V vocabulary. A `mask_BT` is 1 (or True) where a step was really taken by the policy.
"""
