"""How a step's time grows in the group, the prompt and the completion, against the law: P + G·R tokens a prompt.

    python recipes/benchmarks/cost_growth.py

Each line is a pair: the first size and one with a single number changed, in turns. `tokens` is the growth of the tokens
that have to be computed, `update` and `generate` the growth measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from common import Ours, make_model, texts

CHANGES: dict[str, dict[str, int]] = {
    "group 8 -> 16": {"group": 16},
    "prompt 64 -> 256": {"prompt": 256},
    "completion 64 -> 128": {"completion": 128},
    "prompts 4 -> 8": {"prompts": 8},
}
FIRST = {"prompts": 4, "group": 8, "prompt": 64, "completion": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    a = parser.parse_args()

    def side(sizes: dict[str, int]) -> Ours:
        return Ours(*make_model("S", sizes["completion"]), sizes["group"], sizes["completion"])

    report: dict[str, Any] = {}
    for title, change in CHANGES.items():
        sizes = [FIRST, FIRST | change]
        sides = [side(s) for s in sizes]
        growth: dict[str, list[float]] = {"tokens": [], "generate": [], "update": []}
        for step in range(a.steps + 1):
            done = [run.step(texts(s["prompts"], s["prompt"], step), step) for run, s in zip(sides, sizes, strict=True)]
            tokens = [d["tokens"] + s["prompts"] * s["prompt"] for d, s in zip(done, sizes, strict=True)]
            if step:
                growth["tokens"].append(tokens[1] / tokens[0])
                for phase in ("generate", "update"):
                    growth[phase].append(done[1][phase] / done[0][phase])
        report[title] = {name: round(statistics.median(values), 2) for name, values in growth.items()}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
