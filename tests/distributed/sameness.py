"""Whether two runs of two ranks, which hold the same state in other ways, did the same."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.conftest import lines

# A reference, two passes over the data, and micro-batches so small that ranks need different numbers of them.
CHANGES = {
    **{"max_steps": 4, "save_steps": 2, "reward_in_process": True, "engine": "native"},
    **{"beta": 0.1, "num_iterations": 2, "per_device_train_batch_size": 1},
}


def distance(a: Path, b: Path) -> float:
    """Of all tensors of two files together, relative."""
    one, two = load_file(a), load_file(b)
    assert one.keys() == two.keys()
    apart = sum(float((one[name] - two[name]).double().square().sum()) for name in one)
    return float((apart / sum(float(x.double().square().sum()) for x in two.values())) ** 0.5)


NUMBERS = ("reward", "grad_norm", "entropy", "policy_loss")
OF_CRITIC = (*NUMBERS, "critic_grad_norm", "value_loss", "explained_variance")


def same_steps(one: Path, two: Path, names: tuple[str, ...] = (*NUMBERS, "kl")) -> None:
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["tokens"] == b["tokens"]
        for name in names:
            close = 1e-5 if name == "explained_variance" else 1e-6  # one is a quotient of small variances
            assert a[name] == pytest.approx(b[name], abs=close), name


def same_ends(one: Path, two: Path, *files: str) -> None:
    """Models, critics, and what a run goes on from."""
    kept = ("checkpoints/step-000004/weights.safetensors", "checkpoints/step-000004/optimizer.safetensors")
    for file in (*files, *kept):
        assert distance(one / file, two / file) < 1e-6, file


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


def forget_the_last(run: Path) -> None:
    (run / "checkpoints" / "step-000004" / "manifest.json").unlink()
