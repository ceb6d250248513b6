"""What the tests here run, on the CPU and on the simulated accelerator: each function says by `device` where."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llm_pg import Algorithm, Learner, Policy
from llm_pg.config.schema import ModelConfig
from llm_pg.model.flex import FlexBlocks
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.static import batch as static_batch
from tests.conftest import FAMILIES
from tests.model.test_policy import rollouts

Waits = Counter[tuple[str, str]]
TEXTS = ["12+34=", "5+6=", "What is 7+8? ", "1+"]


@dataclasses.dataclass
class Done:
    """What a run gave: numbers by name, the waits for the device, and how much was done meanwhile."""

    numbers: dict[str, Any]
    waits: Waits
    counts: dict[str, int]

    def report(self) -> str:
        """The waits, most frequent first, a line each."""
        lines = (f"{n:4d} x {kind:<28} {line}" for (kind, line), n in self.waits.most_common())
        return "\n".join([f"{sum(self.waits.values())} waits, {self.counts}", *lines])


@contextlib.contextmanager
def counted(device: str) -> Iterator[Waits]:
    """The waits inside the block, known after it; none on a CPU."""
    if device == "cpu":
        yield Counter()
        return
    from tests.device import sim

    with sim.waits() as found:
        yield found


def model_of(family: str = "llama", device: str = "cpu", seed: int = 0, lora: bool = False, **changes: Any) -> Any:
    model = load_model(ModelConfig(make={**FAMILIES[family], **changes}), character_tokenizer(), seed=seed)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.to(device)


def moved(batch: TextRollouts, device: str) -> TextRollouts:
    """The batch with its tensors there."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return TextRollouts(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in fields.items()})


def update(
    algorithm: str,
    *,
    device: str,
    family: str = "llama",
    packing: str = "auto",
    flex: bool = False,
    lora: bool = False,
    spec: dict[str, Any] | None = None,
    inserted: bool = False,
    updates: int = 2,
    **options: Any,
) -> Done:
    """Updates of a learner on batches that are given: every metric, every weight."""
    policy = Policy(model_of(family, device, lora=lora), params=SamplingParams(), pad_id=0, packing=packing)
    if flex:
        policy.layout.way = FlexBlocks
    chosen = Algorithm(algorithm, max_completion_length=7, **(spec or {}))
    trained = list(policy.parameters())
    if chosen.spec.needs_critic:
        trained += policy.add_critic("model" if lora else "head").trainable()
    learner = Learner(policy, chosen, torch.optim.AdamW(trained, lr=1e-2), **{"micro_rows": 2, **options})
    passes: list[int] = []
    learner.updater.progress = passes.append
    numbers: dict[str, Any] = {"layout": policy.layout.name}
    total, steps = Waits(), 0
    for number in range(updates):
        batch = rollouts(num_prompts=4, group=3, seed=number)
        batch.truncated_B[::2] = True
        if inserted:
            batch.inserted_B = [((0, (7, 8, 9)),) if row % 3 else () for row in range(12)]
        batch = moved(batch, device)
        with counted(device) as waits:
            done = learner.update(SimpleNamespace(rollouts=batch))
        total.update(waits)
        steps += len(done.steps)
        numbers.update({f"{name} {number}": value for name, value in done.metrics.items()})
    numbers.update({name: p.detach().cpu().numpy() for name, p in policy.model.named_parameters()})
    return Done(numbers, total, {"passes": len(passes), "steps": steps})


def sample(
    *, device: str, family: str = "llama", limit: int = 40, static: bool = False, at_once: int | None = None,
    lean: bool = True, share_prompts: bool = True, group: int = 4, **params: Any,
) -> Done:  # fmt: skip
    """A batch of completions: tokens and their log-probabilities."""
    tokenizer = character_tokenizer()
    sampler = NativeSampler(
        model_of(family, device), tokenizer, [tokenizer.eos_token_id, 9, 10, 11], at_once,
        static=static, lean=lean, share_prompts=share_prompts,
    )  # fmt: skip
    if static and device != "cpu":  # a tensor of the simulation is of a class of its own, as sharded ones are
        static_batch.stands_whole = lambda model: True
    looks: list[int] = []
    sampler.progress = lambda tokens, ends: looks.append(tokens)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    wanted = SamplingParams(max_completion_length=limit, **params)
    keys_B = torch.arange(len(prompts) * group)
    sampler.sample(prompts, group, wanted, keys_B)  # what is made once
    looks.clear()
    with counted(device) as waits:
        done = sampler.sample(prompts, group, wanted, keys_B)
    numbers = {"way": sampler.choice.name, "static": sampler.static is not None, "tokens": done.tokens_BT.cpu().numpy()}
    numbers["logp"] = done.logp_BT.cpu().numpy()
    numbers["mask"], numbers["truncated"] = done.mask_BT.cpu().numpy(), done.truncated_B.cpu().numpy()
    return Done(numbers, waits, {"looks": len(looks), "tokens": sum(looks), "longest": done.tokens_BT.shape[1]})
