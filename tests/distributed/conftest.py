"""Two ranks of one run, as the fault tests start them."""

from tests.faults.conftest import two_ranks

__all__ = ["two_ranks"]
