"""How a run starts: the policy as it is before step 1, its optimiser, and whether all ranks start with the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithms.algorithm import Algorithm
from ..config import ConfigError
from ..distributed.launch import whole_models
from ..learner.learner import Learner
from ..learner.optimizer import make_optimizer, make_scheduler
from ..model.critic import HEAD_LEARNING_RATE
from ..model.policy import Policy
from ..model.teacher import ScoresTokens
from ..prompts import Prompt, fingerprint
from .before.warm_start import warm_start
from .context import RunContext
from .ranks import Ranks
from .saving.best import load_weights

_SAMPLED = 64  # values of each tensor whose order counts too
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def start_policy(context: RunContext, policy: Policy, *, resumes: bool, held_out: Sequence[Prompt]) -> None:
    """Makes the policy what it is before step 1: warm start, then reference and critic as it is then, then the cut over
    the ranks.

    Args:
        resumes: whether a checkpoint is restored into it next, which holds the weights of the warm start.
        held_out: prompts whose demonstrations are left out of the warm start.
    """
    folder, spec, ranks = context.folder, context.spec, context.ranks
    if not resumes and context.config.warm_start.warm_start_steps:
        _warm_start(context, policy, held_out)
        if ranks.is_main and spec.beta:  # of an adapter, the adapter: the reference of a resumed run
            policy.model.save_pretrained(folder.start, max_shard_size="1000GB")
    elif resumes and spec.beta and folder.start.exists():
        load_weights(policy.model, folder.start)
    if spec.beta and (not policy.has_reference or resumes or context.config.warm_start.warm_start_steps):
        policy.freeze_reference()  # a further run of the same trainer keeps that of the first
    if spec.needs_critic and policy.critic is None:
        critic = context.config.critic
        try:
            policy.add_critic(critic.critic_kind, trunk_gradient=critic.critic_trunk_gradient, path=critic.critic_path)
        except ValueError as error:
            if critic.critic_path is None:
                raise
            raise ConfigError(f"critic_path: {error}") from None
    context.strategy.shard(policy)


def _warm_start(context: RunContext, policy: Policy, held_out: Sequence[Prompt]) -> None:
    settings, clock = context.config.warm_start, context.clock
    with clock("warm_start"), whole_models():  # the weights are cut after it
        prompts = {prompt.text for prompt in held_out}
        loss = warm_start(policy.model, policy.tokenizer, context.config, prompts, context.terminal.progress)
    seconds = clock.seconds["warm_start"]
    steps = f"{settings.warm_start_steps} supervised steps (trl SFTTrainer)"
    context.terminal.say(f"Warm start: {steps}, loss {loss:.3f} nats per token, {seconds:.1f} s.")


def make_learner(
    context: RunContext,
    policy: Policy,
    algorithm: Algorithm,
    own_optimizer: Callable[[], Any],
    own_scheduler: Callable[[int, Any], Any],
    teacher: ScoresTokens | None = None,
) -> Learner:
    """The learner of a run, with its optimiser and schedule; after `start_policy`.

    Args:
        own_optimizer: returns one that is not the config's, over the policy's parameters, or None.
        own_scheduler: returns one that is not the config's, of a number of steps and the optimiser, or None.
        teacher: scores the tokens that are sampled; None = the algorithm has none.
    """
    config, train = context.config, context.config.train
    critic = [] if policy.critic is None else policy.critic.trainable()
    optimizer = own_optimizer()
    if optimizer is None:
        optimizer = make_optimizer(train, policy.parameters(), critic, _critic_rate(context))
    else:
        check_own_optimizer(optimizer, policy)
    steps = train.max_steps - context.critic_only_steps
    scheduler = own_scheduler(steps, optimizer)
    if scheduler is None:
        scheduler = make_scheduler(config, optimizer, steps)
    moves = config.algorithm.sync_ref_model
    return Learner(
        policy,
        algorithm,
        optimizer,
        scheduler,
        teacher=teacher,
        strategy=context.strategy,
        micro_rows=context.plan.micro_rows,
        num_iterations=config.algorithm.num_iterations,
        num_minibatches=config.algorithm.steps_per_generation,
        max_grad_norm=train.max_grad_norm,
        num_steps=train.max_steps,
        critic_only_steps=context.critic_only_steps,
        noise_steps=config.run.noise_steps,
        reference_steps=config.algorithm.ref_model_sync_steps if moves else 0,
        reference_share=config.algorithm.ref_model_mixup_alpha,
        seed=config.run.seed,
        clock=context.clock,
    )


def check_own_optimizer(optimizer: Any, policy: Policy) -> None:
    """ConfigError where what a trainer made is no optimiser of the weights in training."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"create_optimizer returned {optimizer!r}; it returns a torch.optim.Optimizer.")
    if policy.critic is not None:
        raise ConfigError("An optimiser of your own would leave the critic out: use optim, learning_rate and adam_*.")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if held != set(policy.parameters()):
        raise ConfigError(
            f"The optimiser holds {len(held)} parameters, {len(held & set(policy.parameters()))} of them among the "
            f"{len(policy.parameters())} that are trained. Make it over the parameters of trainer.model that require a "
            "gradient, all of them."
        )


def _critic_rate(context: RunContext) -> float:
    settings = context.config.critic
    if settings.critic_learning_rate is not None:
        return settings.critic_learning_rate
    return HEAD_LEARNING_RATE if settings.critic_kind == "head" else 2 * context.config.train.learning_rate


def check_same_start(model: Any, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """ConfigError, on every rank, where one begins with other weights or prompts than the first. All must call it."""
    if ranks.count == 1:
        return
    _compare(weight_digests(model), ranks, "weights", "tensors", "set one seed before the model is made, or load it")
    _compare({"": fingerprint(prompts)}, ranks, "training prompts", "sets", "give all ranks one dataset, in one order")


def _compare(own: dict[str, str], ranks: Ranks, what: str, of: str, advice: str) -> None:
    summary = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    reported = ranks.gather(summary)
    if len(set(reported)) == 1:
        return
    first, *others = ranks.gather(own)
    lines = []
    for rank, theirs in enumerate(others, 1):
        odd = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if odd:
            lines.append(f"rank {rank} ({len(odd)} of {len(first)} {of} differ{f', {odd[0]} first' if odd[0] else ''})")
    raise ConfigError(
        f"The ranks do not begin with the same {what}: other than those of rank 0 are those of {', '.join(lines)}. "
        f"Each would train on its own, on a sum of gradients of all. On every rank: {advice}."
    )


@torch.no_grad()
def weight_digests(model: Any) -> dict[str, str]:
    """A digest of every parameter and buffer by name: type, shape, the sum of its bits as integers, some of its values.

    Sums of integers are exact, so that they do not depend on threads or devices, and any single change shows in them.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _digest(x) for name, x in tensors.items() if not x.is_meta}


def _digest(x: Tensor) -> str:
    bits = x.detach().view(_INTEGERS[x.element_size()])
    total = int(bits.sum(dtype=torch.int64))
    flat = bits.reshape(-1)
    some = flat[:: max(len(flat) // _SAMPLED, 1)].tolist()
    return hashlib.sha256(repr((str(x.dtype), tuple(x.shape), total, some)).encode()).hexdigest()
