"""The update alone: shared prefixes against a row a completion, on the same rollouts, in turns.

python recipes/benchmarks/train_pass.py --size S --prompt-len 256 --completion 128
"""

from __future__ import annotations

import json
import statistics

import torch
from common import Ours, floor, make_model, now, rates, shape_arguments, texts


def main() -> None:
    a = shape_arguments(__doc__)
    model, tokenizer = make_model(a.size, a.completion)
    sides = {
        name: Ours(model, tokenizer, a.group, a.completion, packing=name, micro_rows=rows)
        for name, rows in (("shared_prefix", 10**6), ("padded", 8 * a.group))
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    over_floor = []
    for step in range(a.steps + 1):
        rollouts = sides["shared_prefix"].rollouts(texts(a.prompts, a.prompt_len, step), step)
        for name, side in sides.items():
            weighted = side.algorithm.compute_advantages(rollouts)
            start = now()
            side.updater.update(weighted, torch.arange(len(rollouts.mask_BT)).unsqueeze(0))
            seconds[name].append(now() - start)
        bound = floor(a.size, a.prompts, a.group, a.prompt_len, float(rollouts.mask_BT.sum()), a.completion, rates())
        over_floor.append(seconds["shared_prefix"][-1] / bound["update"])
    pairs = [p / s for p, s in zip(seconds["padded"][1:], seconds["shared_prefix"][1:], strict=True)]
    print(
        json.dumps(
            {
                "seconds": {name: statistics.median(v[1:]) for name, v in seconds.items()},
                "padded_over_shared": {"median": statistics.median(pairs), "range": [min(pairs), max(pairs)]},
                "shared_over_floor": statistics.median(over_floor[1:]),
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
