"""Classic control on the same estimators and algorithms as text: the track where the answer is known.

Nothing here computes an advantage, a return, a KL or a loss: environments, small policies and the collection of
rollouts live here, `estimators/` and `algorithms/` do the rest. Importing this package imports neither torch nor
gymnasium.
"""
