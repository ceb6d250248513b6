"""Rules on a configuration that can run and is unwise. What cannot run at all, `config.check` refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..algorithms.spec import AlgorithmSpec
from ..algorithms.table import ALGORITHMS
from ..config import Config
from ..config.check import BatchPlan, plan_batch, resolve_spec
from .finding import Finding
from .sizes import Sizes, available_bytes, gigabytes, sizes_of, training_bytes

LONG_HORIZON = 500
LOW_TEMPERATURE = 0.4
FEW_EVAL_PROMPTS = 50
FULL_LEARNING_RATE = 2e-5
LORA_LEARNING_RATES = (2e-6, 2e-3)
LONG_RUN = 200
PROVE = "llm-pg prove"


@dataclass(frozen=True)
class ConfigCase:
    """A config with what follows from it. `memory`: bytes there are to train in; None = unknown."""

    config: Config
    num_ranks: int = 1
    memory: int | None = None

    @cached_property
    def spec(self) -> AlgorithmSpec:
        return resolve_spec(self.config)

    @cached_property
    def plan(self) -> BatchPlan:
        return plan_batch(self.config, self.num_ranks)

    @cached_property
    def sizes(self) -> Sizes | None:
        return sizes_of(self.config.model)

    @property
    def reuse(self) -> int:
        return self.config.algorithm.num_iterations * self.config.algorithm.steps_per_generation


Rule = Callable[[ConfigCase], Iterator[Finding]]


def kl_gradient(case: ConfigCase) -> Iterator[Finding]:
    spec = case.spec
    wrong = {("reward", "k2"), ("reward", "k3"), ("loss", "k3")}
    if not spec.beta or (spec.kl_placement, spec.kl_estimator) not in wrong:
        return
    if spec.kl_placement == "loss" and spec.use_bias_correction_kl:
        return
    yield Finding(
        "kl-gradient",
        "warning",
        f"{spec.kl_estimator} in the {spec.kl_placement} does not follow the gradient of the KL that it estimates.",
        f"beta={spec.beta:g}, kl_placement={spec.kl_placement}, kl_estimator={spec.kl_estimator}, "
        f"use_bias_correction_kl={str(spec.use_bias_correction_kl).lower()}",
        "Take kl_placement=reward with kl_estimator=k1 (exact), or k3 in the loss with use_bias_correction_kl=true.",
        f"{PROVE}; Liu et al. 2025, arXiv 2510.01555",
    )


def length_bias(case: ConfigCase) -> Iterator[Finding]:
    spec = case.spec
    own = ALGORITHMS.get(spec.name)
    if spec.loss_type != "grpo" or own is None or own.loss_type == "grpo":
        return
    yield Finding(
        "length-bias",
        "warning",
        "The mean over a completion's own tokens counts each token of a long completion less: long wrong answers are "
        "punished less than short ones, and lengths drift.",
        f"loss_type=grpo (the row {spec.name} itself has {own.loss_type})",
        "Take loss_type=dr_grpo or sequence_sum (unbiased in length), or dapo.",
        f"{PROVE}; Liu et al. 2025, arXiv 2503.20783",
    )


def cispo_bound(case: ConfigCase) -> Iterator[Finding]:
    bound = case.spec.epsilon_high
    if case.spec.surrogate != "cispo" or bound is None or bound >= 1:
        return
    yield Finding(
        "cispo-bound",
        "warning",
        "The bound of the ratio is below 1, where ratios begin: it only makes every gradient smaller.",
        f"surrogate=cispo, epsilon_high={bound:g}",
        *("Take epsilon_high=5.0.", "MiniMax-M1 2025, arXiv 2506.13585"),
    )


def moving_support(case: ConfigCase) -> Iterator[Finding]:
    rollout = case.config.rollout
    cuts = [f"{k}={getattr(rollout, k):g}" for k in ("top_k", "min_p") if getattr(rollout, k)]
    cuts += [f"top_p={rollout.top_p:g}"] if rollout.top_p < 1 else []
    if not cuts or (case.reuse == 1 and not case.spec.beta):
        return
    why = "the KL to the reference" if case.reuse == 1 else "the importance ratio"
    yield Finding(
        "moving-support",
        "warning",
        f"Sampling is cut to the likely tokens, and {why} compares distributions that do not keep the same tokens.",
        f"{', '.join(cuts)}; beta={case.spec.beta:g}, num_iterations × steps_per_generation = {case.reuse}",
        "Sample from the full distribution (top_k=0 top_p=1 min_p=0); lower the temperature if samples are too wild.",
        "Holtzman et al. 2020, arXiv 1904.09751, for the cut; the ratio needs π_old > 0 wherever π > 0",
    )


def long_without_baseline(case: ConfigCase) -> Iterator[Finding]:
    spec, length = case.spec, case.config.rollout.max_completion_length
    # Centred by the batch's mean, or by one of the user's.
    centred = spec.normalize_advantages != "none" or spec.advantage is not None
    if spec.baseline != "none" or centred or length <= LONG_HORIZON:
        return
    yield Finding(
        "no-baseline",
        "problem",
        f"REINFORCE without a baseline on a horizon over {LONG_HORIZON}: the variance of the return drowns the "
        "gradient.",
        f"algorithm={spec.name}, baseline=none, max_completion_length={length}",
        "Take algorithm=rloo, or baseline=running_mean.",
        "Williams 1992; Greensmith et al. 2004, JMLR 5:1471",
    )


def group_of_two(case: ConfigCase) -> Iterator[Finding]:
    if case.spec.scale_rewards != "group" or case.plan.num_generations != 2:
        return
    yield Finding(
        "group-of-two",
        "warning",
        "In a group of two, dividing by the group's deviation leaves only a sign: any two different rewards give the "
        "same advantages.",
        "num_generations=2, scale_rewards=group",
        "Take num_generations=4 or more, or scale_rewards=none.",
        "(r - mean) / deviation = ±1/√2 for every pair of different rewards",
    )


def batch_of_one_prompt(case: ConfigCase) -> Iterator[Finding]:
    plan = case.plan
    if plan.prompts > 2:
        return
    yield Finding(
        "few-prompts",
        "warning",
        "A step follows the gradient of one or two prompts; most such steps have no signal or a misleading one.",
        f"{plan.prompts} prompts × {plan.num_generations} generations = {plan.rows} completions a step on "
        f"{case.num_ranks} rank{'s' if case.num_ranks > 1 else ''}",
        "Raise prompts_per_step (memory does not grow: passes are cut to per_device_train_batch_size).",
        "McCandlish et al. 2018, arXiv 1812.06162",
    )


def learning_rate(case: ConfigCase) -> Iterator[Finding]:
    model, rate = case.config.model, case.config.train.learning_rate
    if not model.model_name_or_path:
        return
    source = "Schulman et al. 2025, LoRA Without Regret; TRL 1.16 defaults"
    if model.use_peft and not LORA_LEARNING_RATES[0] <= rate <= LORA_LEARNING_RATES[1]:
        low = rate < LORA_LEARNING_RATES[0]
        yield Finding(
            "learning-rate",
            "warning",
            f"The learning rate is {'too low to move an adapter' if low else 'high even for an adapter'}.",
            f"learning_rate={rate:g} with use_peft=true",
            "Adapters want about ten times the rate of full training: start from 1e-5 to 1e-4.",
            source,
        )
    if not model.use_peft and rate > FULL_LEARNING_RATE:
        yield Finding(
            "learning-rate",
            "warning",
            "The learning rate is high for reinforcement on all weights of a pretrained model; runs collapse.",
            f"learning_rate={rate:g} with use_peft=false",
            "Start from 1e-6 (0.5B to 8B), at most 1e-5 for the smallest; or train an adapter (use_peft=true).",
            source,
        )


def memory(case: ConfigCase) -> Iterator[Finding]:
    sizes = case.sizes
    if sizes is None or case.memory is None:
        return
    parts = training_bytes(case.config, sizes, case.spec.beta > 0, case.plan.micro_rows)
    need = sum(parts.values())
    if need <= case.memory:
        return
    spelled = " + ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    yield Finding(
        "memory",
        "problem",
        "The run will not fit in memory.",
        f"{sizes.parameters / 1e6:.0f} M parameters, {case.plan.micro_rows} completions in a pass: {spelled} = "
        f"{gigabytes(need)} GB, and there are {gigabytes(case.memory)} GB",
        "Lower per_device_train_batch_size (the gradient stays the same), set gradient_checkpointing=true, or "
        "use_peft=true; beta=0 needs no reference.",
        "weights, gradients and two moments of AdamW; logits of one chunk three times over",
    )


def context(case: ConfigCase) -> Iterator[Finding]:
    sizes, prompt = case.sizes, case.config.data.max_prompt_length or 1
    length = case.config.rollout.max_completion_length
    if sizes is None or not sizes.context or prompt + length <= sizes.context:
        return
    known = case.config.data.max_prompt_length
    yield Finding(
        "context",
        "problem",
        "Prompt and completion together are longer than the model's context.",
        f"max_prompt_length {known or 'not set, at least 1'} + max_completion_length {length} > "
        f"context {sizes.context}",
        f"Lower max_completion_length to {max(sizes.context - prompt, 1)} or less, or take a model with a longer "
        "context.",
        "the model's max_position_embeddings",
    )


def cold_sampling(case: ConfigCase) -> Iterator[Finding]:
    temperature = case.config.rollout.temperature
    if temperature > LOW_TEMPERATURE:
        return
    yield Finding(
        "cold-sampling",
        "warning",
        "At this temperature the completions of a group are nearly the same: no differences, no signal.",
        f"temperature={temperature:g}",
        "Take temperature=1; what is sampled is what is trained, so a low one also sharpens the gradient by its "
        "inverse.",
        "docs: a group whose rewards are all equal has advantage 0",
    )


_ONLY_WITH: tuple[tuple[tuple[str, ...], str, Callable[[AlgorithmSpec], bool]], ...] = (
    (
        ("lam", "lam_value", "lam_length_alpha", "vf_coef", "value_clip"),
        "an algorithm that has a critic (a2c, ppo)",
        lambda spec: spec.needs_critic,
    ),
    (("baseline_decay", "baseline_column"), "baseline=running_mean", lambda spec: spec.baseline == "running_mean"),
    (("sapo_temperature_pos", "sapo_temperature_neg"), "surrogate=sapo", lambda spec: spec.surrogate == "sapo"),
    (("divergence_type",), "surrogate=dppo", lambda spec: spec.surrogate == "dppo"),
    (("teacher_discount",), "teacher_coef above 0", lambda spec: spec.teacher_coef > 0),
    (
        ("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"),
        "use_adaptive_entropy=true",
        lambda spec: spec.use_adaptive_entropy,
    ),
    (
        tuple(f"vllm_importance_sampling_{word}" for word in ("mode", "clip_max", "clip_min")),
        "vllm_importance_sampling_correction=true",
        lambda spec: spec.vllm_importance_sampling_correction,
    ),
    (("epsilon", "epsilon_high", "delta"), "a surrogate that clips", lambda spec: spec.surrogate in ("clip", "cispo")),
)


def _without_effect(case: ConfigCase) -> list[str]:
    """Settings that were given and that only another setting would bring to bear."""
    out = []
    for names, condition, holds in _ONLY_WITH:
        given = [name for name in names if getattr(case.config.algorithm, name) is not None]
        if given and not holds(case.spec):
            out.append(f"{' and '.join(given)} act{'s' * (len(given) == 1)} only with {condition}")
    return out


def idle_settings(case: ConfigCase) -> Iterator[Finding]:
    given, spec = case.config.algorithm, case.spec
    idle = _without_effect(case)
    if not spec.beta and (given.kl_placement or given.kl_estimator or given.use_bias_correction_kl is not None):
        idle.append("kl_placement, kl_estimator and use_bias_correction_kl act only with beta above 0")
    clipped = given.epsilon is not None or given.epsilon_high is not None or given.delta is not None
    if clipped and case.reuse == 1 and spec.surrogate == "clip":
        idle.append("epsilon clips nothing while num_iterations × steps_per_generation is 1: the ratio is always 1")
    if spec.truncated == "penalize" and not spec.truncation_penalty:
        idle.append("truncated=penalize takes off truncation_penalty, which is 0")
    if spec.truncated != "penalize" and given.truncation_penalty:
        idle.append(f"truncation_penalty acts only with truncated=penalize, which is {spec.truncated}")
    if given.entropy_coef_final and not given.entropy_coef:
        idle.append("entropy_coef starts at 0 and rises to entropy_coef_final, the reverse of a decay")
    if idle:
        yield Finding(
            "idle-settings",
            "note",
            "Some settings do nothing, or the opposite of what their names suggest.",
            "; ".join(idle),
            "Remove them, or set what they depend on.",
            "llm-pg train --help",
        )


def warmup(case: ConfigCase) -> Iterator[Finding]:
    train = case.config.train
    if train.warmup_steps * 2 <= train.max_steps:
        return
    yield Finding(
        "warmup",
        "warning",
        "Most of the run is warm-up: the learning rate hardly reaches its peak.",
        f"warmup_steps={train.warmup_steps}, max_steps={train.max_steps}",
        f"Take warmup_steps={max(train.max_steps // 20, 1)}.",
        "transformers get_scheduler",
    )


def dropout_ratio(case: ConfigCase) -> Iterator[Finding]:
    if case.config.model.disable_dropout:
        return
    yield Finding(
        "dropout",
        "warning",
        "With dropout the trainer scores a token by another network than the one that sampled it: ratios and KL are "
        "noise even on-policy.",
        "disable_dropout=false",
        "Leave model.disable_dropout=true.",
        "the metric sampler_gap shows it",
    )


def small_evaluation(case: ConfigCase) -> Iterator[Finding]:
    number = case.config.data.num_eval_prompts
    if not 0 < number < FEW_EVAL_PROMPTS or case.config.data.eval_data_files:
        return
    yield Finding(
        "small-evaluation",
        "note",
        "The held-out set is too small to tell an improvement from luck.",
        f"num_eval_prompts={number}: a pass rate of 50 % has a 95 % interval of ± {98 / number**0.5:.0f} points",
        "Hold out 200 prompts or more (± 7 points).",
        "1.96 √(p (1 - p) / n)",
    )


def nothing_saved(case: ConfigCase) -> Iterator[Finding]:
    config = case.config
    if config.run.save_steps or config.train.max_steps < LONG_RUN or not config.model.model_name_or_path:
        return
    yield Finding(
        "nothing-saved",
        "warning",
        "A long run without checkpoints: whatever ends it early loses all of it.",
        f"max_steps={config.train.max_steps}, save_steps=0",
        "Set run.save_steps; a resumed run goes on bit for bit.",
        "llm-pg train --resume",
    )


STATIC_RULES: dict[str, Rule] = {
    "kl-gradient": kl_gradient,
    "length-bias": length_bias,
    "cispo-bound": cispo_bound,
    "moving-support": moving_support,
    "no-baseline": long_without_baseline,
    "group-of-two": group_of_two,
    "few-prompts": batch_of_one_prompt,
    "learning-rate": learning_rate,
    "memory": memory,
    "context": context,
    "cold-sampling": cold_sampling,
    "idle-settings": idle_settings,
    "warmup": warmup,
    "dropout": dropout_ratio,
    "small-evaluation": small_evaluation,
    "nothing-saved": nothing_saved,
}


def examine_config(config: Config, *, num_ranks: int = 1, memory_bytes: int | None = None) -> list[Finding]:
    """Findings on a config that `load_config` accepted.

    Args:
        config: of `load_config`.
        num_ranks: processes that will share a step.
        memory_bytes: what one rank has to train in; None = this machine's memory where that can be read.
    """
    case = ConfigCase(config, num_ranks, available_bytes() if memory_bytes is None else memory_bytes)
    return [finding for rule in STATIC_RULES.values() for finding in rule(case)]


def arithmetic(config: Config, num_ranks: int = 1) -> str:
    """The batch of a step, spelled out in one line."""
    plan = plan_batch(config, num_ranks)
    passes = -(-plan.minibatch_rows // plan.micro_rows)
    updates = config.algorithm.num_iterations * config.algorithm.steps_per_generation
    ranks, each = (f" over {num_ranks} ranks", " a rank") if num_ranks > 1 else ("", "")
    return (
        f"A step: {plan.prompts} prompts × {plan.num_generations} generations = {plan.rows} completions{ranks}; "
        f"{updates} optimiser step{'s' if updates > 1 else ''} of {plan.minibatch_rows} completions{each}, "
        f"in {passes} pass{'es' if passes > 1 else ''} of {plan.micro_rows}."
    )
