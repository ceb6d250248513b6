"""Processes that end together: a parent's death, a guard between two processes, and the end of all descendants."""
