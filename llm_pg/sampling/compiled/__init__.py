"""Decoding on a CPU by kernels of our own: `kernels.cpp`, compiled once by `build`; `decoder` steps with them.

Optional: without a compiler the lean layers, which are of torch's operations, take its place.
"""
