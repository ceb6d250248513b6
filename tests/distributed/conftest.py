"""Two ranks of one run, as the fault tests start them."""

from tests.faults.conftest import launch, two_ranks

__all__ = ["launch", "two_ranks"]
