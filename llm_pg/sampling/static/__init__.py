"""Decoding in steps of fixed shapes, which a GPU records once and replays.

`step` is one token of all rows, `graphs` its recordings, `weights` copies under autocast, `batch` the host's part.
"""
