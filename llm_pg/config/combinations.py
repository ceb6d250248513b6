"""Changes of a row that do not go together, each refused with what to do instead. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..algorithms.spec import GROUP_BASELINES, AlgorithmSpec

if TYPE_CHECKING:
    from .schema import Config


def check_combinations(spec: AlgorithmSpec, config: Config) -> None:
    """Raise ValueError, in one paragraph, at the first combination that cannot work."""
    _check_own(spec)
    _check_best_of_k(spec, config.rollout.num_generations)
    _check_likelihood(spec, config)
    _check_other_objective(spec)
    _check_sampler(spec)
    _check_penalties(spec, config)
    _check_teacher(spec, config)
    _check_dynamic_sampling(spec, config)


def _check_own(spec: AlgorithmSpec) -> None:
    """A function takes the place of all that makes an advantage; the greedy completion is there for it to read."""
    if spec.advantage is None:
        return
    plain = AlgorithmSpec("", "")
    names = ("baseline", "baseline_per_step", "scale_rewards", "pass_k")
    idle = [
        f"{name} {getattr(spec, name)}" for name in names if getattr(spec, name) not in (getattr(plain, name), "greedy")
    ]
    if idle:
        raise ValueError(
            f"algorithm {spec.name} is a function that gives the advantages itself, which leaves {' and '.join(idle)} "
            "without effect. Compute it in the function, or take a row of the table."
        )


def _check_best_of_k(spec: AlgorithmSpec, group: int) -> None:
    if not spec.pass_k:
        return
    if spec.pass_k >= group:
        raise ValueError(
            f"pass_k is {spec.pass_k} and num_generations {group}: a completion is compared with the best of pass_k "
            f"others of its group, so a group needs at least {spec.pass_k + 1}. Raise num_generations or lower pass_k."
        )
    if (spec.returns, spec.baseline, spec.scale_rewards) != ("total", "leave_one_out", "none"):
        raise ValueError(
            f"pass_k {spec.pass_k} brings its own weights, those of the best of k completions, and would leave "
            f"returns {spec.returns}, baseline {spec.baseline} and scale_rewards {spec.scale_rewards} without effect. "
            "Use algorithm=pass_at_k, or leave pass_k out."
        )


def _check_likelihood(spec: AlgorithmSpec, config: Config) -> None:
    if spec.scale_rewards != "group_mean":
        return
    if (spec.returns, spec.baseline) != ("total", "group_mean"):
        raise ValueError(
            f"scale_rewards group_mean is the gradient of the likelihood of success with returns total and baseline "
            f"group_mean, and of nothing known with returns {spec.returns} and baseline {spec.baseline}. Use "
            "algorithm=maxrl unchanged, or another scale_rewards."
        )
    if spec.truncated == "penalize" and spec.truncation_penalty:
        raise ValueError(
            f"scale_rewards group_mean divides by the mean reward of a group, which truncation_penalty "
            f"{spec.truncation_penalty:g} can push below 0. Use truncated keep or mask, or a reward that is 0 for "
            "truncated completions."
        )
    negative = [w for w in config.reward.reward_weights or () if w < 0]
    if negative:
        raise ValueError(
            f"scale_rewards group_mean divides by the mean reward of a group, which the reward weight {negative[0]:g} "
            "can push below 0. Use weights of 0 and above, or algorithm=rloo."
        )


def _check_other_objective(spec: AlgorithmSpec) -> None:
    if (spec.pass_k or spec.scale_rewards == "group_mean") and spec.beta and spec.kl_placement == "reward":
        what = f"pass_k {spec.pass_k}" if spec.pass_k else "scale_rewards group_mean"
        raise ValueError(
            f"beta is {spec.beta:g} with kl_placement reward, and {what} is made for verdicts: a reward less its KL is "
            "none. Use kl_placement=loss with kl_estimator=k2 or k3, or beta=0."
        )


def _check_sampler(spec: AlgorithmSpec) -> None:
    low, high = spec.vllm_importance_sampling_clip_min, spec.vllm_importance_sampling_clip_max
    if spec.vllm_importance_sampling_correction and low is not None and high is not None and low >= high:
        raise ValueError(
            f"vllm_importance_sampling_clip_min is {low:g} and vllm_importance_sampling_clip_max {high:g}: no ratio "
            "lies between them. The lower bound must be below the upper one, and below 1."
        )


def _check_penalties(spec: AlgorithmSpec, config: Config) -> None:
    updates = config.algorithm.num_iterations * config.algorithm.steps_per_generation
    if spec.kl_target and updates == 1:
        raise ValueError(
            f"kl_target is {spec.kl_target:g}, and every batch is used for one update: until the policy has moved away "
            "from the one that sampled, the penalty between the two has no gradient. Raise num_iterations or "
            "steps_per_generation, or use beta, the penalty to the reference."
        )
    if spec.use_adaptive_entropy and (spec.entropy_coef_final is not None or spec.top_entropy_quantile < 1):
        odd = "entropy_coef_final" if spec.entropy_coef_final is not None else "top_entropy_quantile"
        raise ValueError(
            f"use_adaptive_entropy is true and {odd} is {getattr(spec, odd):g}: the weight follows the entropy of all "
            f"tokens. Leave {odd} out, or use_adaptive_entropy."
        )
    if config.algorithm.sync_ref_model and not spec.beta:
        raise ValueError(
            "sync_ref_model is true and beta is 0, so there is no reference to refresh. Set beta above 0, or "
            "sync_ref_model=false."
        )


def require_teacher(spec: AlgorithmSpec, config: Config) -> None:
    """Raise ValueError where the algorithm learns from a teacher and none is named.

    Not a part of the checks of a config, as a trainer may be given one as an object.
    """
    if spec.teacher_coef and not (config.model.teacher_model_name_or_path or config.model.teacher_model_server_url):
        raise ValueError(
            f"algorithm {spec.name} has teacher_coef {spec.teacher_coef:g} and no teacher is named. Set "
            "teacher_model_name_or_path to a hub id or folder of a model with the same tokenizer, or give a trainer "
            "its teacher_model."
        )


def _check_teacher(spec: AlgorithmSpec, config: Config) -> None:
    name, url = config.model.teacher_model_name_or_path, config.model.teacher_model_server_url
    if name and url:
        raise ValueError("teacher_model_name_or_path and teacher_model_server_url are both given; give one teacher.")
    if not name and (config.model.teacher_model_revision or config.model.teacher_model_init_kwargs):
        raise ValueError(
            "teacher_model_revision and teacher_model_init_kwargs are for a teacher that is loaded here, and "
            "teacher_model_name_or_path names none. Set it, or leave them out."
        )
    if (name or url) and not spec.teacher_coef:
        raise ValueError(
            f"the teacher {name or url!r} is given, and algorithm {spec.name} learns from no teacher (teacher_coef 0). "
            "Use algorithm=opd (from the teacher alone) or set teacher_coef above 0 (from rewards and teacher), or "
            "leave the teacher out."
        )
    if spec.teacher_coef and config.algorithm.dynamic_sampling_max_rounds:
        raise ValueError(
            f"dynamic_sampling_max_rounds is {config.algorithm.dynamic_sampling_max_rounds} and teacher_coef "
            f"{spec.teacher_coef:g}: a group with equal rewards still learns from the teacher, so that none is silent. "
            "Use dynamic_sampling_max_rounds=0."
        )


def _check_dynamic_sampling(spec: AlgorithmSpec, config: Config) -> None:
    rounds = config.algorithm.dynamic_sampling_max_rounds
    silent = spec.baseline in GROUP_BASELINES or spec.pass_k or spec.advantage is not None
    if rounds and not silent:
        raise ValueError(
            f"dynamic_sampling_max_rounds is {rounds}, and {spec.name} has baseline {spec.baseline}: a group with "
            "equal rewards is not silent there, so that dropping it would bias the gradient. Use an algorithm with a "
            "group baseline (grpo, dapo, rloo), or dynamic_sampling_max_rounds=0."
        )
