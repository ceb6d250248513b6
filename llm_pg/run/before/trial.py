"""The longest possible batch, tried before the first step: what does not fit into memory shows at once, with what to
change, and not in the middle of a night.

One micro-batch of the longest prompt and completions of full length goes forward and backward through the model,
the largest that a step can hold; twice, as the first pass warms up and only the second has the speed of a step. Its
gradient is thrown away; random numbers, weights and every other state stay as they were, so that the run is bit for bit
the one without the trial.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config import Config
from ...distributed.tensors import shape_of
from ...doctor import arithmetic
from ...doctor.sizes import Sizes, training_bytes
from ...learner.learner import Learner
from ...model.policy import Policy
from ...prompts import Prompt
from ...rollouts import TextRollouts
from ..context import RunContext
from ..guard import RunStopped
from ..logs.throughput import wait

LARGE = 50_000_000  # parameters from which a trial on the CPU is worth its seconds
LEAST_TRAINED = 0.25  # share of a step's groups with a signal, where few have one; the others are dropped


@dataclass(frozen=True)
class Trial:
    """One trial of the longest batch.

    Attributes:
        rows, prompt, completion: completions tried together and their lengths in tokens.
        passes: such passes over a whole step of longest completions.
        seconds: of one warm pass.
        peak_mb: of the accelerator, or None.
        asked: rows that the settings asked for; more than `rows` where those did not fit.
    """

    rows: int
    prompt: int
    completion: int
    passes: int
    seconds: float
    peak_mb: float | None
    asked: int

    def __str__(self) -> str:
        peak = "" if self.peak_mb is None else f", peak {self.peak_mb:,.0f} MB"
        return (
            f"Longest batch tried: {self.rows} completions of {self.prompt} + {self.completion} tokens, forward and "
            f"backward in {self.seconds:.2f} s{peak}; a step has at most {self.passes} of them."
        )


def wanted(setting: bool | None, policy: Policy) -> bool:
    """Whether to try: as set, else on an accelerator, or where the model is large enough to fill a machine's memory.

    Small models on the CPU are trained in seconds, of which a trial would be a noticeable part.
    """
    if setting is not None:
        return setting
    device = next(policy.model.parameters()).device
    return device.type != "cpu" or sum(p.numel() for p in policy.model.parameters()) >= LARGE


def try_longest_batch(context: RunContext, learner: Learner, prompts: Sequence[Prompt]) -> Trial | None:
    """Whether the longest batch of a run fits, before anything depends on it; None where it is not tried.

    Prints the arithmetic of the batch and the memory it takes. prompts: to train on.
    """
    config, plan, terminal, policy = context.config, context.plan, context.terminal, learner.policy
    terminal.say(f"{arithmetic(config, context.ranks.count)}\n{memory_text(config, policy, plan.micro_rows)}")
    if context.strategy.sharded:
        terminal.say(f"{context.strategy.description} The longest batch is not tried.")
        return None
    if not wanted(config.run.try_longest_batch, policy):
        return None
    with terminal.during("trial"):
        trial = try_longest(
            policy,
            prompt_length=max(len(prompt.ids) for prompt in prompts),
            completion_length=config.rollout.max_completion_length,
            num_groups=plan.rows_per_rank // plan.num_generations,
            num_generations=plan.num_generations,
            micro_rows=plan.micro_rows,
            entropy_grad=bool(context.spec.entropy_coef),
            moments=not learner.optimizer.state,
        )
    terminal.say(str(trial))
    if trial.rows < trial.asked:
        terminal.warn(
            f"{trial.asked} of the longest completions do not fit into memory together, {trial.rows} do: passes "
            f"are limited to as many tokens as those have, {policy.layout.most_tokens:,}, with the same gradient."
        )
    return trial


def try_longest(
    policy: Policy,
    *,
    prompt_length: int,
    completion_length: int,
    num_groups: int,
    num_generations: int,
    micro_rows: int,
    entropy_grad: bool = False,
    moments: bool = True,
) -> Trial:
    """Forward and backward of the largest micro-batch of a step whose prompts and completions are all the longest.

    Args:
        policy: of the run. prompt_length, completion_length: tokens. num_groups, num_generations, micro_rows: of a step
            on this rank. entropy_grad: whether the bonus on the entropy is trained.
        moments: hold as much memory as AdamW's two moments will, which are made at the first step only. A critic's
            pass, gradient and moments are tried with the policy's.

    Where less fits than the settings ask for, the policy's passes are no larger from here on.

    Raises:
        RunStopped: a single completion does not fit.
    """
    model, device = policy.model, next(policy.model.parameters()).device
    rollouts = longest_rollouts(prompt_length, completion_length, num_groups, num_generations, policy, device)
    cuts = policy.layout.cuts(rollouts, micro_rows)
    index = max(cuts, key=len)
    asked, on_gpu = len(index), device.type == "cuda"
    modes = {module: module.training for module in (model, policy.critic) if module is not None}
    trained = [*policy.parameters(), *([] if policy.critic is None else policy.critic.trainable())]
    with torch.random.fork_rng(devices=[device] if on_gpu else [], device_type="cuda"):
        ballast = [torch.empty_like(p) for p in trained for _ in range(2)] if moments else []
        try:
            for module in modes:
                module.train()
            while (seconds := _warm_seconds(policy, rollouts.rows(index), entropy_grad)) is None:
                if len(index) == 1:
                    raise RunStopped(_advice(prompt_length, completion_length))
                index = index[: len(index) // 2]
            peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None
        finally:
            del ballast
            for module, was_training in modes.items():
                module.train(was_training)
            for parameter in trained:
                parameter.grad = None
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
    if len(index) < asked:
        policy.layout.limit_passes(rollouts.rows(index))
    passes = -(-len(rollouts.mask_BT) // len(index))
    return Trial(len(index), prompt_length, completion_length, passes, seconds, peak, asked)


def _warm_seconds(policy: Policy, rows: TextRollouts, entropy_grad: bool) -> float | None:
    """Seconds of the second of two passes, which adds to the gradient of the first; None where one does not fit."""
    if not _fits(policy, rows, entropy_grad):
        return None
    wait(rows.mask_BT.device)
    begin = time.perf_counter()
    if not _fits(policy, rows, entropy_grad):
        return None
    wait(rows.mask_BT.device)
    return time.perf_counter() - begin


def _fits(policy: Policy, rows: TextRollouts, entropy_grad: bool) -> bool:
    try:
        scores = policy.forward(rows, entropy_grad=entropy_grad)
        loss = scores.logp_BT.sum()
        if entropy_grad:
            loss = loss + scores.entropy_BT.sum()
        if scores.value_BT is not None:
            loss = loss + scores.value_BT.sum()
        loss.backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    # Outside the handler, which would keep the tensors of the failed pass alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def longest_rollouts(
    prompt: int, completion: int, num_groups: int, num_generations: int, policy: Policy, device: torch.device
) -> TextRollouts:
    """A step whose rows are all of full length, of tokens that differ between prompts; drawn from no generator."""
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    num_rows = num_groups * num_generations
    places = torch.arange(num_rows * completion, device=device).view(num_rows, completion)
    mask_BT = torch.ones((num_rows, completion), dtype=torch.bool, device=device)
    prompts = [tuple((g + i) % vocabulary for i in range(prompt)) for g in range(num_groups)]
    rollouts: TextRollouts = TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=torch.zeros((num_rows, completion), device=device),
        group_B=torch.arange(num_groups, device=device).repeat_interleave(num_generations),
        reward_B=torch.zeros(num_rows, device=device),
        tokens_BT=places % vocabulary,
        prompt_ids_B=[ids for ids in prompts for _ in range(num_generations)],
    )
    return rollouts


def _advice(prompt: int, completion: int) -> str:
    return (
        f"The longest batch does not fit into memory: one completion of {completion} tokens behind a prompt of "
        f"{prompt} runs out of it. Lower rollout.max_completion_length or data.max_prompt_length, or set "
        "train.gradient_checkpointing=true, model.use_peft=true (with model.dtype=bfloat16)."
    )


def memory_text(config: Config, policy: Policy, micro_rows: int) -> str:
    """The memory that training takes, by part, predicted before it is taken."""
    model = policy.model
    parameters, vocabulary = (
        sum(math.prod(shape_of(p)) for p in model.parameters()),
        shape_of(model.get_input_embeddings().weight)[0],
    )
    parts = training_bytes(config, Sizes(parameters, vocabulary, 0), policy.reference is not None, micro_rows)
    reported = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return f"Memory at least {_size(sum(parts.values()))}: {reported}; activations come on top."


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def expected_seconds(
    trial: Trial, num_steps: int, passes: int, rows: int, rate: float, length: float
) -> tuple[float, float]:
    """Seconds of sampling and training of all steps, from few to many.

    few: completions half as long as `length`, and LEAST_TRAINED of the groups trained on. many: completions of full
    length, all trained on. Evaluation and saving come on top.

    Args:
        passes: μ, over the rows of a step on this rank. rate: tokens sampled and scored a second. length: mean length
            of completions now, in tokens.
    """

    def of(tokens: float, trained: float) -> float:
        share = (trial.prompt + tokens) / (trial.prompt + trial.completion)
        return num_steps * (rows * tokens / rate + trained * trial.seconds * trial.passes * passes * share)

    return of(length / 2, LEAST_TRAINED), of(trial.completion, 1.0)
