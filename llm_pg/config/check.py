"""What makes a configuration impossible, found without torch: words, group sizes, batch arithmetic, combinations."""

from __future__ import annotations

import dataclasses
import os
from pathlib import PurePath
from typing import TYPE_CHECKING

from ..algorithms import spec as specs
from ..algorithms.registry import find_spec
from ..algorithms.spec import AlgorithmSpec
from ..words import one_of
from .combinations import check_combinations
from .engines import ENGINES
from .exactness import check_exactness

if TYPE_CHECKING:
    from .schema import Config

DEFAULT_PROMPTS = 8  # of a step


def resolve_spec(config: Config) -> AlgorithmSpec:
    """The algorithm's row of the table with the changes of the config."""
    given = config.algorithm
    fields = {field.name for field in dataclasses.fields(AlgorithmSpec)} - {"name", "source", "advantage"}
    changes = {k: v for k in fields if (v := getattr(given, k, None)) is not None}
    if given.mask_truncated_completions:
        if given.truncated not in (None, "mask"):
            raise ValueError(
                f"mask_truncated_completions is true and truncated is {given.truncated}: both say what becomes of "
                "completions cut by the length limit. Give one of them."
            )
        changes["truncated"] = "mask"
    if config.rollout.max_staleness and changes.setdefault("vllm_importance_sampling_correction", True):
        changes.setdefault("vllm_importance_sampling_mode", "token_truncate")
    return find_spec(given.name, changes)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a step is cut: `prompts` × `num_generations` = `rows` on all ranks; minibatches of an optimiser step each.

    Ranks hold whole groups, in order, as nearly equally many as can be; `rows_per_rank` is of the rank with most.
    """

    prompts: int
    num_generations: int
    rows: int
    rows_per_rank: int
    minibatch_rows: int
    micro_rows: int

    def share(self, number: int, count: int) -> range:
        """The places in the step of the prompts of rank `number` of `count`."""
        return share(self.prompts, number, count)


def share(things: int, number: int, count: int) -> range:
    """The places of what falls to `number` of `count`, in order and as nearly equally many as can be."""
    return range(things * number // count, things * (number + 1) // count)


def plan_batch(config: Config, num_ranks: int = 1) -> BatchPlan:
    """The batch arithmetic; ValueError that spells it out where it does not divide."""
    train, group = config.train, config.rollout.num_generations
    micro, accumulate, prompts = (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.prompts_per_step,
    )
    if micro and accumulate:
        rows = micro * accumulate * num_ranks
        sum_text = (
            f"per_device_train_batch_size {micro} × gradient_accumulation_steps {accumulate} × {num_ranks} "
            f"rank{'s' if num_ranks > 1 else ''} = {rows} completions"
        )
        if rows % group:
            raise ValueError(
                f"{sum_text}, which does not divide by num_generations {group}: a step must hold whole groups. "
                f"The nearest batches are {rows // group * group or group} and {(rows // group + 1) * group}."
            )
        if prompts and prompts * group != rows:
            raise ValueError(
                f"{sum_text}, but prompts_per_step {prompts} × num_generations {group} = {prompts * group}. "
                "Give prompts_per_step alone (passes are then cut to per_device_train_batch_size), or make them equal."
            )
        prompts = rows // group
    prompts = prompts or DEFAULT_PROMPTS
    cuts = config.algorithm.steps_per_generation
    if prompts < num_ranks:
        raise ValueError(
            f"prompts_per_step {prompts} is fewer than {num_ranks} ranks, and each rank samples whole groups. Take "
            f"{num_ranks} or a multiple of it, or fewer ranks."
        )
    if prompts % num_ranks and cuts > 1:
        raise ValueError(
            f"prompts_per_step {prompts} does not divide by {num_ranks} ranks, and steps_per_generation is {cuts}: a "
            f"minibatch holds the same share of every rank. Take {prompts // num_ranks * num_ranks} prompts, or "
            "steps_per_generation=1."
        )
    rows = prompts * group
    per_rank = -(-prompts // num_ranks) * group
    if per_rank % cuts:
        raise ValueError(
            f"{prompts} prompts × {group} generations / {num_ranks} ranks = {per_rank} completions on a rank, which "
            f"steps_per_generation {cuts} does not divide. Take a divisor of {per_rank}."
        )
    minibatch = per_rank // cuts
    return BatchPlan(prompts, group, rows, per_rank, minibatch, min(micro or minibatch, minibatch))


def check_config(config: Config) -> None:
    """Raise ValueError, in one paragraph, at the first thing that cannot work."""
    spec = resolve_spec(config)
    plan = plan_batch(config, int(os.environ.get("WORLD_SIZE", "1")))
    _check_critic(spec, config)
    _check_group(spec, config.rollout.num_generations)
    _check_reuse(spec, config)
    check_combinations(spec, config)
    _check_engine(config)
    _check_environment(config)
    _check_ahead(spec, config)
    _check_best(config)
    if config.train.packing == "shared_prefix" and config.train.gradient_checkpointing:
        raise ValueError(
            "packing is shared_prefix and gradient_checkpointing is true: layers that run again in the backward pass "
            "would not find the packed layout's attention. Use packing=auto, which then pads, or "
            "gradient_checkpointing=false: packed passes need less memory to begin with."
        )
    if config.train.bf16 and config.train.fp16:
        raise ValueError("bf16 and fp16 are both true; choose one.")
    check_exactness(spec, config)
    if spec.beta and spec.kl_placement == "loss" and spec.kl_estimator == "k1" and not spec.use_bias_correction_kl:
        raise ValueError(
            "kl_estimator k1 with kl_placement loss is no penalty: its expected gradient is 0. Use kl_placement "
            "reward with k1 (exact), or k3 in the loss."
        )
    if spec.surrogate == "cispo" and spec.epsilon_high is None:
        raise ValueError("surrogate cispo needs epsilon_high, the upper bound of the ratio (5.0 in MiniMax-M1).")
    data = config.data
    if data.task and config.data.num_train_prompts < plan.prompts:
        raise ValueError(
            f"num_train_prompts {data.num_train_prompts} is fewer than one step needs ({plan.prompts} prompts)."
        )
    sources = [k for k in ("task", "dataset_name", "data_files") if getattr(data, k)]
    if len(sources) > 1:
        raise ValueError(f"data names {' and '.join(sources)}; give one source of prompts.")
    _check_run_name(config.run.run_name, config.run.output_dir)
    if config.model.model_name_or_path and config.model.make:
        raise ValueError("model.model_name_or_path and model.make are both given; give one.")
    weights, funcs = config.reward.reward_weights, config.reward.reward_funcs
    if weights is not None and funcs and len(weights) != len(funcs):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers and reward_funcs {len(funcs)} functions; give one weight each."
        )


def _check_run_name(name: str | None, output_dir: str) -> None:
    """A run's folder lies in output_dir: files of it are deleted when a run begins anew."""
    if name is None or (name.strip() and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts):
        return
    raise ValueError(
        f"run_name {name!r} is no folder inside output_dir {output_dir!r}, where the run is written. Give a name "
        "without '..', and set output_dir where the folder belongs elsewhere."
    )


def _check_group(spec: AlgorithmSpec, group: int) -> None:
    if spec.needs_group and group < 2:
        what = spec.baseline if spec.baseline in specs.GROUP_BASELINES else f"scale_rewards {spec.scale_rewards}"
        raise ValueError(
            f"num_generations is {group}, and {spec.name} uses {what}: a completion is compared with the others of its "
            "group, so a group needs at least 2. Raise num_generations, or use algorithm reinforce with baseline "
            "running_mean."
        )


def _check_critic(spec: AlgorithmSpec, config: Config) -> None:
    if spec.truncated == "bootstrap" and not spec.needs_critic:
        raise ValueError(
            f"truncated is bootstrap, and {spec.name} (baseline {spec.baseline}) has no critic, whose value replaces "
            "what would have followed. Use keep, mask or penalize, or an algorithm with a critic (a2c, ppo)."
        )
    warmup, steps = config.critic.critic_warmup_steps, config.train.max_steps
    if spec.needs_critic and warmup >= steps:
        raise ValueError(
            f"critic_warmup_steps is {warmup} and max_steps {steps}: the policy would never be trained. Take fewer "
            "steps of warm-up (5 to 50), or more steps."
        )
    if spec.needs_critic and config.critic.critic_kind == "model" and config.critic.critic_trunk_gradient:
        raise ValueError(
            "critic_trunk_gradient lets a value head move the policy's body; critic_kind model has a body of its own. "
            "Use critic_kind head, or leave critic_trunk_gradient out."
        )


def _check_engine(config: Config) -> None:
    rollout = config.rollout
    if not ENGINES[rollout.engine].served:
        return
    if config.model.load_in_4bit:
        raise ValueError(
            "load_in_4bit with engine vllm: the server would need every merged weight at every step, and 4 bits hold "
            "none of them exactly. Use engine=native or transformers, or weights in bfloat16."
        )
    if rollout.vllm_enable_lora and (rollout.vllm_mode != "server" or rollout.max_staleness):
        raise ValueError(
            "vllm_enable_lora brings adapters to servers that follow the policy step by step. Use vllm_mode=server and "
            "max_staleness=0, or leave vllm_enable_lora out."
        )
    if rollout.min_p and rollout.top_p < 1.0:
        raise ValueError(
            f"min_p {rollout.min_p} and top_p {rollout.top_p} with engine vllm: vLLM applies min_p before top_p and "
            "the trainer after it, so another distribution would be sampled than trained. Use one of them, or engine "
            "native."
        )
    if rollout.vllm_urls and rollout.vllm_python:
        raise ValueError("vllm_urls names servers that run, and vllm_python one to start; give one of them.")
    _check_mode(config)


def _check_mode(config: Config) -> None:
    """What vLLM in the trainer's own process cannot do."""
    rollout = config.rollout
    if rollout.vllm_mode == "server":
        if rollout.vllm_enable_sleep_mode:
            raise ValueError(
                "vllm_enable_sleep_mode is true and vllm_mode is server: a server is a process of its own and keeps "
                "its memory. Use vllm_mode=colocate, or lower vllm_gpu_memory_utilization."
            )
        return
    refusals = {
        "vllm_urls and vllm_python belong to servers. Leave them out": bool(rollout.vllm_urls or rollout.vllm_python),
        f"vllm_tensor_parallel_size {rollout.vllm_tensor_parallel_size} needs other devices than the trainer's. Use "
        "vllm_tensor_parallel_size=1": rollout.vllm_tensor_parallel_size > 1,
        f"max_staleness {rollout.max_staleness} samples beside the update, and both would share one process and "
        "device. Use max_staleness=0": rollout.max_staleness > 0,
        "vllm_enable_sleep_mode gives back a GPU's memory, and use_cpu asks for none. Leave it out": (
            rollout.vllm_enable_sleep_mode and config.train.use_cpu
        ),
    }
    for reason, holds in refusals.items():
        if holds:
            raise ValueError(f"vllm_mode is colocate: {reason}, or vllm_mode=server.")


def _check_environment(config: Config) -> None:
    rollout = config.rollout
    if rollout.environment is None and rollout.calls_tools:
        return
    if rollout.environment is None:
        given = [name for name in ("environment_options", "max_turn_length") if getattr(rollout, name)]
        if given:
            raise ValueError(f"rollout.{given[0]} is set and rollout.environment names no environment; set both.")
        return
    if rollout.calls_tools:
        raise ValueError(
            f"rollout.environment is {rollout.environment!r}, and tools are given: only one of them can answer the "
            "model. Leave rollout.environment out, or tools, mcp_servers and environment_factory."
        )
    if config.reward.reward_funcs:
        raise ValueError(
            f"rollout.environment is {rollout.environment!r} and reward_funcs are given: an environment gives the "
            "rewards itself. Leave reward_funcs out; the environment tools judges the last turn by a function that "
            "rollout.environment_options names, {reward: ...}."
        )


def _check_ahead(spec: AlgorithmSpec, config: Config) -> None:
    """What cannot be sampled ahead of its update."""
    rollout = config.rollout
    refusals = {
        f"engine {rollout.engine} keeps no older weights. Use engine native or vllm": (
            ENGINES[rollout.engine].older_weights is None
        ),
        "an environment of several turns is played in the trainer. Leave rollout.environment out": (
            rollout.environment is not None
        ),
        "tools are called in the trainer. Leave tools, mcp_servers and environment_factory out": rollout.calls_tools,
        f"{spec.name} has a critic, whose returns along old completions would need a correction at every token. Use an "
        "algorithm without a critic": spec.needs_critic,
        "the further prompts of dynamic sampling would be chosen by a curriculum that moves meanwhile. Use one of "
        "them": bool(config.algorithm.dynamic_sampling_max_rounds) and config.data.curriculum != "none",
    }
    for reason, holds in refusals.items():
        if holds and rollout.max_staleness:
            raise ValueError(f"rollout.max_staleness is {rollout.max_staleness}: {reason}, or max_staleness=0.")


def _check_best(config: Config) -> None:
    """The metric that the best model is chosen by must be one of the held-out evaluation."""
    run = config.run
    if run.metric_for_best_model is None and not run.load_best_model_at_end:
        return
    if not config.data.num_eval_prompts:
        raise ValueError(
            "The best model is found by evaluation on held-out prompts, and num_eval_prompts is 0: hold some out."
        )
    known, metric = best_metrics(config), run.metric_for_best_model or "eval/greedy"
    of_a_set = metric.startswith("eval/") and any(metric.endswith(f"_{name.removeprefix('eval/')}") for name in known)
    if not of_a_set:  # whether there is a set of that name, is seen when the data are read
        one_of("metric_for_best_model", metric, known)


def best_metrics(config: Config) -> list[str]:
    """Returns the names of an evaluation's numbers that can choose the best model."""
    samples = config.eval.eval_num_samples
    known = ["eval/greedy", "eval/strict", "eval/lenient", "eval/reward", "eval_reward", "eval/length"]
    if samples:
        known.append("eval/sampled_reward")
        ks = {2**i for i in range(samples.bit_length())} | {samples}
        known += ["eval/sampled", *(f"eval/pass@{k}" for k in sorted(ks))]
    return known


def _check_reuse(spec: AlgorithmSpec, config: Config) -> None:
    reuse = config.algorithm.num_iterations * config.algorithm.steps_per_generation
    if reuse > 1 and spec.surrogate == "reinforce":
        raise ValueError(
            f"num_iterations × steps_per_generation is {reuse}, and surrogate reinforce knows no importance ratio: "
            "after one update its data are stale. Use surrogate=clip, or 1 and 1."
        )
