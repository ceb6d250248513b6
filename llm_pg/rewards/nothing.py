"""What stands where reward functions would, in a run that learns from a teacher alone."""


def no_reward(completion: str) -> float:
    """Returns 0: the run has no reward function."""
    return 0.0
