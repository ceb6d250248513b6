"""Every kind of adapter of the installed peft: its reference is the policy as it was, or it is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftType
from peft.tuners.lora import config as of_lora

from llm_pg.config import ConfigError
from llm_pg.metrics import read_metrics
from tests import tiny
from tests.model.test_policy import rollouts
from tests.seams import Steps

SMALL = {"max_steps": 3, "prompts_per_step": 4, "max_completion_length": 3, "beta": 0.05}
SMALL |= {"noise_steps": 0, "log_completions": 0}
TWO = ["q_proj", "v_proj"]
TOKENS = list(range(5, 95))
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(**{"r": 4, "target_modules": TWO, **options})


def needs(package: str, make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        pytest.importorskip(package, reason=f"this kind of peft needs {package}")
        return make()

    return made


# Each with dropout where it has some, as that must be off too.
TRAINED: dict[str, Callable[[], Any]] = {
    "LORA": lora(target_modules="all-linear", lora_dropout=0.5),
    "ADAMSS": needs("sklearn", lambda: peft.AdamssConfig(r=4, num_subspaces=2, target_modules=TWO)),
    "BEFT": lambda: peft.BeftConfig(target_modules=TWO),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], boft_dropout=0.5),
    "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=TWO),
    "DEFT": lambda: peft.DeftConfig(r=4, target_modules=TWO, deft_dropout=0.5),
    "DELORA": lambda: peft.DeloraConfig(r=4, target_modules=TWO, module_dropout=0.5),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=TWO),
    "FROD": lambda: peft.FrodConfig(target_modules=TWO, progressbar=False, frod_dropout=0.5),
    "GLORA": lambda: peft.GloraConfig(r=4, target_modules=TWO),
    "GRALORA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=TWO, gralora_dropout=0.5),
    "HIRA": lambda: peft.HiraConfig(r=4, target_modules=TWO, hira_dropout=0.5),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TWO),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LOHA": lambda: peft.LoHaConfig(r=4, target_modules=TWO, rank_dropout=0.5, module_dropout=0.5),
    "LOKR": lambda: peft.LoKrConfig(r=4, target_modules=TWO, rank_dropout=0.5, module_dropout=0.5),
    "MISS": lambda: peft.MissConfig(r=4, target_modules=TWO, miss_dropout=0.5),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TWO, module_dropout=0.5),
    "SHIRA": lambda: peft.ShiraConfig(r=2, target_modules=TWO),
    "OSF": lambda: peft.OSFConfig(effective_rank=4, target_modules=TWO),
    "PEANUT": lambda: peft.PeanutConfig(r=4, target_modules=TWO),
    "PSOFT": lambda: peft.PsoftConfig(r=4, psoft_alpha=4, target_modules=["q_proj"], psoft_dropout=0.5),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=TWO, randlora_dropout=0.5),
    "ROAD": lambda: peft.RoadConfig(group_size=8, target_modules=TWO),
    "SUPERTUNING": lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=TWO),
    "TINYLORA": lambda: peft.TinyLoraConfig(r=2, u=8, target_modules=TWO, tinylora_dropout=0.5),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
    "UNILORA": lambda: peft.UniLoraConfig(r=4, theta_d_length=64, target_modules=TWO, unilora_dropout=0.5),
    "VBLORA": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=4, target_modules=TWO, vblora_dropout=0.5),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], vera_dropout=0.5),
    "WAVEFT": needs("pywt", lambda: peft.WaveFTConfig(n_frequency=40, target_modules=TWO)),
    "bias=all": lora(bias="all"),
    "bias=lora_only": lora(bias="lora_only"),
    "modules_to_save": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "trainable_token_indices": lora(trainable_token_indices=TOKENS),
    "layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "target_parameters": lora(target_parameters=["mlp.up_proj.weight"]),
    "kasa": lora(kasa_config=of_lora.KasaConfig()),
    "velora": lora(velora_config=of_lora.VeloraConfig(num_groups=2)),
    **{f"init={init}": lora(init_lora_weights=init) for init in (False, "gaussian", "orthogonal", "eva")},
    **{f"init={init}": lora(init_lora_weights=init) for init in ("pissa", "pissa_niter_4", "olora")},
}
COPIED = {"init=False", "init=pissa", "init=pissa_niter_4", "init=olora", "bias=all", "bias=lora_only"}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "ADALORA": (lambda: peft.AdaLoraConfig(total_step=4, target_modules=TWO), "by calls of its own at every step"),
    "ADAPTION_PROMPT": (
        lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
        "puts learned prompts into attention",
    ),
    "CARTRIDGE": (lambda: peft.CartridgeConfig(**VIRTUAL), "learned tokens before the prompt"),
    "CPT": (
        lambda: peft.CPTConfig(cpt_token_ids=[4], cpt_mask=[1], cpt_tokens_type_mask=[1], task_type="CAUSAL_LM"),
        "learned tokens before the prompt",
    ),
    "LILY": (lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=TWO), "mean over all tokens of a pass"),
    "PROMPT_TUNING": (lambda: peft.PromptTuningConfig(**VIRTUAL), "learned tokens before the prompt"),
    "MULTITASK_PROMPT_TUNING": (
        lambda: peft.MultitaskPromptTuningConfig(**VIRTUAL, num_tasks=2),
        "learned tokens before the prompt",
    ),
    "P_TUNING": (lambda: peft.PromptEncoderConfig(**VIRTUAL), "learned tokens before the prompt"),
    "PREFIX_TUNING": (lambda: peft.PrefixTuningConfig(**VIRTUAL), "learned tokens before the prompt"),
    "POLY": (lambda: peft.PolyConfig(r=4, target_modules=TWO), "needs a task number"),
    "PVERA": (lambda: peft.PveraConfig(r=4, target_modules=["q_proj"]), "draws at random, or acts in training alone"),
    "SHADOW": (lambda: peft.ShadowConfig(r=4, task_type="CAUSAL_LM"), "runs a second model beside the layers"),
    "XLORA": (lambda: peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={}), "mixes adapters by a pass"),
    "monteclora": (lora(monteclora_config=of_lora.MontecloraConfig()), "draws at random, or acts in training alone"),
    "alora": (lora(alora_invocation_tokens=[5]), "at certain tokens"),
    "init=corda": (lora(init_lora_weights="corda"), "peft cannot add LoraConfig"),
    "arrow": (lora(arrow_config=of_lora.ArrowConfig()), "peft cannot add LoraConfig"),
    "adamss asa": (
        needs("sklearn", lambda: peft.AdamssConfig(r=4, num_subspaces=2, target_modules=TWO, use_asa=True)),
        "chooses its subspaces",
    ),
}


@pytest.fixture
def make(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def trainer(peft_config: Any, family: str = "llama", **changes: Any) -> Any:
        return tiny.trainer(make_model(family), tokenizer, tmp_path, peft_config=peft_config, **{**SMALL, **changes})

    return trainer


def test_every_kind_of_the_installed_peft_is_trained_or_refused_here() -> None:
    kinds = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert kinds <= TRAINED.keys() | REFUSED.keys()
    assert {kind.value for kind in PeftType} >= kinds


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", TRAINED)
def test_the_reference_is_the_policy_before_step_one_and_never_moves(kind: str, make: Callable[..., Any]) -> None:
    trainer = make(TRAINED[kind](), "qwen2" if "bias" in kind else "llama")  # the first has biases
    batch, start = rollouts(), []  # type: Any, list[torch.Tensor]

    def begins(step: int) -> None:
        if step == 1:
            start.extend((trainer.policy.logp(batch, 4), trainer.policy.ref_logp(batch, 4)))

    trainer.add_callback(Steps(before=begins))
    trainer.train()
    lines = read_metrics(trainer.folder.metrics)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-10)
    assert all(line["sampler_gap"] < 1e-6 for line in lines)
    torch.testing.assert_close(start[1], start[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(trainer.policy.ref_logp(batch, 4), start[1], rtol=0, atol=0)
    assert not torch.equal(trainer.policy.logp(batch, 4), start[0])
    if kind in COPIED or kind == "LORA":
        assert (trainer.policy.start is not None) == (kind in COPIED)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_pass_here_would_leave_out_is_refused_by_name(kind: str, make: Callable[..., Any]) -> None:
    config, why = REFUSED[kind]
    with pytest.raises(ConfigError, match=why):
        make(config())


def test_dropout_that_was_asked_for_is_left(make: Callable[..., Any]) -> None:
    trainer = make(TRAINED["LORA"](), disable_dropout=False)
    trainer.train()
    assert read_metrics(trainer.folder.metrics)[-1]["sampler_gap"] > 1e-4


def test_an_adapter_that_changes_nothing_is_named(make_model: Callable[..., Any]) -> None:
    from llm_pg.model.adapters import check_passes

    model = peft.get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=TWO))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["o_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name)
    with pytest.raises(ConfigError, match="change nothing"):
        check_passes(model)
