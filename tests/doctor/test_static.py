"""Every static rule fires on a config that has its fault and is silent on the same config without it."""

import json
from pathlib import Path

import pytest

from llm_pg.config import load_config
from llm_pg.doctor import STATIC_RULES, examine_config
from llm_pg.doctor.sizes import sizes_of
from llm_pg.doctor.static import arithmetic

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
LARGE = 10**12
HUB = "model_name_or_path=some/Model-0.5B"
TINY = "model.make={model_type: llama, hidden_size: 64, num_hidden_layers: 2, max_position_embeddings: 512}"
TASK = "data.task=sort_letters"

# rule -> (settings that trigger it, the same put right)
CASES: dict[str, tuple[list[str], list[str]]] = {
    "kl-gradient": (
        ["beta=0.1", "kl_placement=reward", "kl_estimator=k3"],
        ["beta=0.1", "kl_placement=reward", "kl_estimator=k1"],
    ),
    "length-bias": (["loss_type=grpo"], ["loss_type=dr_grpo"]),
    "cispo-bound": (["algorithm=cispo", "epsilon_high=0.2"], ["algorithm=cispo", "epsilon_high=5.0"]),
    "moving-support": (["top_k=50", "num_iterations=2"], ["top_k=0", "num_iterations=2"]),
    "no-baseline": (
        ["algorithm=reinforce", "max_completion_length=501"],
        ["algorithm=reinforce", "max_completion_length=501", "baseline=running_mean"],
    ),
    "group-of-two": (["num_generations=2"], ["num_generations=2", "scale_rewards=none"]),
    "few-prompts": (["prompts_per_step=1"], ["prompts_per_step=8"]),
    "learning-rate": ([HUB, "learning_rate=1e-4"], [HUB, "learning_rate=1e-4", "use_peft=true"]),
    "memory": (["model_name_or_path=some/Model-900B"], [HUB]),
    "context": ([TINY, "max_completion_length=512"], [TINY, "max_completion_length=400"]),
    "cold-sampling": (["temperature=0.1"], ["temperature=0.8"]),
    "idle-settings": (["epsilon=0.3"], ["epsilon=0.3", "num_iterations=2"]),
    "warmup": (["warmup_steps=80", "max_steps=100"], ["warmup_steps=5", "max_steps=100"]),
    "dropout": (["disable_dropout=false"], ["disable_dropout=true"]),
    "small-evaluation": (["num_eval_prompts=20"], ["num_eval_prompts=200"]),
    "nothing-saved": ([HUB, "max_steps=1000"], [HUB, "max_steps=1000", "save_steps=100"]),
}


def rules(settings: list[str]) -> list[str]:
    return [f.rule for f in examine_config(load_config(None, [TASK, *settings]), memory_bytes=LARGE)]


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(STATIC_RULES)


@pytest.mark.parametrize("rule", CASES)
def test_the_rule_fires_on_its_fault_and_on_nothing_else(rule: str) -> None:
    trigger, _ = CASES[rule]
    assert rules(trigger) == [rule]


@pytest.mark.parametrize("rule", CASES)
def test_the_rule_is_silent_once_the_config_is_put_right(rule: str) -> None:
    assert rules(CASES[rule][1]) == []


@pytest.mark.parametrize("rule", CASES)
def test_a_finding_names_cause_evidence_change_and_source(rule: str) -> None:
    (finding,) = examine_config(load_config(None, [TASK, *CASES[rule][0]]), memory_bytes=LARGE)
    assert all(len(text) > 10 for text in (finding.cause, finding.evidence, finding.change, finding.source))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_have_no_finding_where_there_is_memory(path: Path) -> None:
    assert examine_config(load_config(path), memory_bytes=LARGE) == []


@pytest.mark.parametrize(
    "settings",
    [
        ["beta=0.1", "use_bias_correction_kl=false"],
        ["beta=0.1", "kl_placement=reward", "kl_estimator=k2"],
    ],
)
def test_each_biased_place_of_the_kl_is_found(settings: list[str]) -> None:
    assert rules(settings) == ["kl-gradient"]


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        (["lam=0.9"], "algorithm=ppo"),
        (["lam_value=1"], "algorithm=ppo"),
        (["value_clip=0.2"], "algorithm=a2c"),
        (["baseline_decay=0.5"], "algorithm=reinforce baseline=running_mean"),
        (["sapo_temperature_neg=2"], "algorithm=sapo"),
        (["divergence_type=binary_kl"], "algorithm=dppo"),
        (["entropy_target=0.5"], "use_adaptive_entropy=true"),
        (["teacher_discount=0"], "algorithm=opd model.teacher_model_name_or_path=somebody/teacher"),
        (["vllm_importance_sampling_clip_max=2"], "vllm_importance_sampling_correction=true"),
        (["epsilon=0.1", "algorithm=reinforce"], "algorithm=dapo num_iterations=2"),
    ],
)
def test_a_setting_that_acts_only_beside_another_is_named_without_it(settings: list[str], needs: str) -> None:
    (finding,) = examine_config(load_config(None, [TASK, *settings]), memory_bytes=LARGE)
    assert finding.rule == "idle-settings"
    assert settings[0].split("=")[0] in finding.evidence
    assert rules([*settings, *needs.split()]) == []


def test_a_mean_of_the_batch_or_of_the_user_is_a_baseline(tmp_path: Path) -> None:
    """reinforce_plus_plus takes the mean off its advantages; what a function of the user's takes off, nobody knows."""
    (tmp_path / "mine.py").write_text("def less(rollouts):\n    return rollouts.reward_BT.sum(1)\n")
    for name in ("reinforce_plus_plus", f"{tmp_path}/mine.py:less"):
        assert rules([f"algorithm={name}", "max_completion_length=1024"]) == []


def test_parameters_of_a_made_model_are_counted_as_transformers_counts_them() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    make = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "tie_word_embeddings": False,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**make))
    sizes = sizes_of(load_config(None, [f"model.make={json.dumps(make)}"]).model)
    assert sizes is not None
    assert sizes.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


@pytest.mark.parametrize(
    "name, parameters",
    [("Qwen/Qwen2.5-0.5B-Instruct", 5e8), ("HuggingFaceTB/SmolLM2-135M", 1.35e8), ("meta-llama/Llama-3.1-8B", 8e9)],
)
def test_a_hub_name_tells_the_number_of_parameters(name: str, parameters: float) -> None:
    sizes = sizes_of(load_config(None, [f"model_name_or_path={name}"]).model)
    assert sizes is not None
    assert sizes.parameters == parameters


def test_the_batch_is_spelled_out() -> None:
    config = load_config(None, ["prompts_per_step=8", "num_generations=4", "per_device_train_batch_size=6"])
    assert arithmetic(config, num_ranks=2) == (
        "A step: 8 prompts × 4 generations = 32 completions over 2 ranks; 1 optimiser step of 16 completions a rank, "
        "in 3 passes of 6."
    )
