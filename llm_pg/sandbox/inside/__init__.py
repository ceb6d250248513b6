"""Programs that run inside the sandbox when a function is judged by tests. Read as text, never imported.

Two programs, each in a sandbox of its own, joined by a socket pair. `solution` runs the model's code. `referee` runs
the tests, which call the model's functions through the socket and get plain values back. So nothing of the model's is
ever in the process that decides: no `__eq__`, no patched builtin, no frame to read the expected values from, and an
exit ends the solution, not the tests.
"""
