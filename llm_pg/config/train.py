"""The section of a config that says how the update is made: its size, the optimiser, the numbers it computes in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .section import Section

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Optimiser = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "adamw_anyprecision",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "stable_adamw",
    "grokadamw",
    "adafactor",
    "adagrad",
    "rmsprop",
    "sgd",
]


class TrainConfig(Section):
    """The optimiser and the size of a step."""

    max_steps: int = Field(100, gt=0, description="Batches of rollouts to train on.")
    prompts_per_step: int | None = Field(None, gt=0, description="Prompts of a step, on all ranks together.")
    per_device_train_batch_size: int | None = Field(
        None, gt=0, description="Completions in one forward pass; changes memory and speed, never the gradient."
    )
    gradient_accumulation_steps: int | None = Field(
        None, gt=0, description="Forward passes per step; with the line above it gives the batch, as in TRL."
    )
    optim: Optimiser = Field(
        "adamw_torch_fused",
        description="An optimiser of transformers, by its name there; the 8-bit and paged ones need bitsandbytes, the "
        "adamw_torch_4bit and _8bit ones torchao.",
    )
    optim_args: str | None = Field(None, description="Its own arguments, key=value and commas between (momentum=0.9).")
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Schedule = Field(
        "constant_with_warmup", description="A schedule of transformers' get_scheduler."
    )
    lr_scheduler_kwargs: dict[str, Any] = Field({}, description="Its own arguments, for example num_cycles.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Of matrices; biases and norms have none.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Of AdamW.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Of AdamW.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 = never.")
    bf16: bool = Field(
        False,
        description="Autocast to bfloat16 where tokens are sampled, scored and trained; sampler_gap tells how far "
        "sampling and training then differ.",
    )
    fp16: bool = Field(False, description="Autocast to float16 with loss scaling.")
    exact_on_policy: bool = Field(
        False,
        description="Sample by the trainer's own numbers, so that the ratio of the two is exactly 1 and sampler_gap 0; "
        "slower. On a CPU, engine native, models in the style of Llama, one optimiser step a batch; what does not "
        "allow it is refused by name.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    packing: Literal["auto", "padded", "shared_prefix"] = Field(
        "auto",
        description="Layout of a training pass: shared_prefix = no padding and each prompt once for all its "
        "completions, padded = a row a completion; auto = the first that a trial finds exact of shared_prefix, "
        "each prompt once with its completions going on from the model's cache (hybrids), and padded.",
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description="Weight of the load-balancing loss of a mixture of experts, over all tokens of an optimiser step "
        "however it is cut (a step of several passes needs further ones, without a gradient, to count choices first); "
        "None = that of the model's config, 0 = none.",
    )
    use_cpu: bool = Field(False, description="Stay on the CPU even where there is an accelerator.")
