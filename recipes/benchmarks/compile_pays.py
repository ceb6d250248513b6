"""After how many steps torch.compile of the layers has paid for itself in the update, and how far its gradient is off.

python recipes/benchmarks/compile_pays.py --size S --prompt-len 64 --steps 12

Each layer is compiled once with symbolic sizes (one graph for all layers and all lengths); attention, whose layout is
ours, stays as it is. Both sides update on the same rollouts, in turns.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from common import Ours, make_model, shape_arguments, texts

from llm_pg.model.packing import Packed


def main() -> None:
    a = shape_arguments(__doc__)
    Packed.attend = torch.compiler.disable(Packed.attend)  # type: ignore[method-assign]
    sides: dict[str, Ours] = {}
    for name in ("eager", "compiled"):
        model, tokenizer = make_model(a.size, a.completion)
        sides[name] = Ours(model, tokenizer, a.group, a.completion)
        for layer in model.base_model.layers if name == "compiled" else ():
            layer.compile(dynamic=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gaps = []
    for step in range(a.steps):
        rollouts = sides["eager"].rollouts(texts(a.prompts, a.prompt_len, step), step)
        for name, side in sides.items():
            side.updater.strategy.zero_grad()
            weighted = side.algorithm.compute_advantages(rollouts)
            start = time.perf_counter()
            side.updater.update(weighted, torch.arange(len(rollouts.mask_BT)).unsqueeze(0))
            seconds[name].append(time.perf_counter() - start)
        print({name: round(v[-1], 2) for name, v in seconds.items()}, file=sys.stderr, flush=True)
        if step == 0:  # the weights are still the same
            grads = [gradient(side) for side in sides.values()]
            gaps.append(float((grads[1] - grads[0]).norm() / grads[0].norm()))
    warm = a.steps // 3
    eager, compiled = (statistics.median(v[warm:]) for v in seconds.values())
    ratios = [e / c for e, c in zip(seconds["eager"][warm:], seconds["compiled"][warm:], strict=True)]
    spent = sum(seconds["compiled"][:warm]) - warm * compiled
    print(
        json.dumps(
            {
                "seconds": {"eager": eager, "compiled": compiled},
                "eager_over_compiled": {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
                "compile_seconds": spent,
                "break_even_steps": spent / (eager - compiled) if compiled < eager else None,
                "gradient_gap": gaps[0],
                "each": seconds,
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
    )


def gradient(side: Ours) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in side.policy.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
