"""Kernels of our own for a CPU: what decoding and the update would otherwise do in many small operations of torch.

C++ without torch's headers, compiled once by `build`; `decoding` and `update` call it with tensors. Optional: without a
compiler torch's operations take its place.
"""
