"""What the tests here run, on the CPU and on the simulated accelerator: each function says by `device` where."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from llm_pg import Algorithm, Learner, Policy
from llm_pg.config.schema import ModelConfig
from llm_pg.metrics import read_metrics
from llm_pg.model import flex as flex_module
from llm_pg.model.flex import FlexBlocks
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.model.teacher import Teacher
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.static import batch as static_batch
from tests import tiny
from tests.conftest import FAMILIES
from tests.model.test_policy import rollouts

Waits = Counter[tuple[str, str]]
TIMES = re.compile("second|time|memory|mfu|step")
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
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
        )
    return model.to(device)


def moved(batch: TextRollouts, device: str) -> TextRollouts:
    """The batch with its tensors there."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return TextRollouts(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in fields.items()})


def counting(*policies: Policy) -> list[int]:
    """Grows with each forward pass of these policies."""
    passes: list[int] = []
    for policy in policies:
        forward = policy.layout.hidden_states

        def counted_forward(model: Any, rows: TextRollouts, *given: Any, forward: Any = forward, **flags: Any) -> Any:
            passes.append(len(rows.mask_BT))
            return forward(model, rows, *given, **flags)

        policy.layout.hidden_states = counted_forward  # type: ignore[method-assign]
    return passes


def dense(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float | None, **_: Any) -> Tensor:
    """What torch's flex attention computes, by the whole matrix of scores: torch knows a list of devices."""
    place = torch.arange(query.shape[2], device=query.device)
    zero = torch.zeros((), dtype=torch.int64, device=query.device)
    seen = block_mask.mask_mod(zero, zero, place.unsqueeze(1), place)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def flex(*, device: str) -> Done:
    """Log-probabilities through flex attention, of which torch has no gradient on a CPU."""
    policy = Policy(model_of("llama", device), params=SamplingParams(), pad_id=0)
    policy.layout.way = FlexBlocks
    if device != "cpu":
        flex_module.attention_kernel = lambda kind: dense
    batch = moved(rollouts(num_prompts=4, group=3), device)
    with torch.no_grad(), counted(device) as waits:
        logp_BT = policy.forward(batch, with_entropy=False).logp_BT
    return Done({"logp": logp_BT.cpu().numpy()}, waits, {"passes": 1})


def update(
    algorithm: str,
    *,
    device: str,
    family: str = "llama",
    packing: str = "auto",
    lora: bool = False,
    spec: dict[str, Any] | None = None,
    inserted: bool = False,
    updates: int = 1,
    **options: Any,
) -> Done:
    """Updates of a learner on batches that are given: every metric, every weight."""
    policy = Policy(model_of(family, device, lora=lora), params=SamplingParams(), pad_id=0, packing=packing)
    chosen = Algorithm(algorithm, max_completion_length=7, **(spec or {}))
    trained = list(policy.parameters())
    if chosen.spec.needs_critic:
        trained += policy.add_critic("model" if lora else "head").trainable()
    policies = [policy]
    if chosen.spec.teacher_coef:
        options["teacher"] = Teacher(model_of(family, device, seed=1), params=policy.params, pad_id=0)
        policies.append(options["teacher"]._scorer)
    learner = Learner(policy, chosen, torch.optim.SGD(trained, lr=1e-2), **{"micro_rows": 2, **options})
    passes = counting(*policies)
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


def run(folder: str, *, device: str, stop_after: int = 0, resume: bool = False, **changes: Any) -> Done:
    """A run of a trainer, stopped after so many steps (0 = not): the metrics of each step, and the weights."""
    callbacks = [StopAt(stop_after)] if stop_after else []
    options = {"max_steps": 3, "learning_rate": 1e-3, "use_cpu": device == "cpu", "save_steps": 1, "log_completions": 2}
    made = tiny.trainer(model_of(), character_tokenizer(), Path(folder), callbacks=callbacks, **{**options, **changes})
    made.train(resume=resume)
    numbers: dict[str, Any] = {"device": made.policy.model.device.type}
    for row in read_metrics(Path(folder) / "r" / "metrics.jsonl"):
        kept = {name: x for name, x in row.items() if isinstance(x, int | float) and not TIMES.search(name)}
        numbers.update({f"{name} {row['step']}": x for name, x in kept.items()})
    numbers.update({name: p.detach().cpu().numpy() for name, p in made.policy.model.named_parameters()})
    return Done(numbers, Waits(), {})


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


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
        static_batch.stands_whole, static_batch.state_of = lambda model: True, lambda model: ()
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
