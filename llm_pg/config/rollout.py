"""The section of a config that says how completions are sampled."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .section import Section


class RolloutConfig(Section):
    """How completions are sampled. What is sampled is what is trained: these enter the trained log-probability."""

    engine: Literal["native", "transformers", "vllm"] = Field("native", description="What samples.")
    num_generations: int = Field(8, gt=0, description="G, completions per prompt.")
    max_completion_length: int = Field(256, gt=0, description="Longest completion in tokens, the end token included.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; also divides the trained logits.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: the smallest set of tokens with this mass.")
    top_k: int = Field(0, ge=0, description="Keep the k most probable tokens; 0 = all.")
    min_p: float = Field(0.0, ge=0, lt=1, description="Keep tokens with this share of the largest probability.")
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="Positive logits of tokens that the prompt or the completion has so far are divided by it, "
        "negative ones multiplied, in the trained distribution too; 1 = none.",
    )
    stop: list[str] = Field([], description="Strings that end a completion; the token that completes one is its last.")
    rollout_batch_size: int | None = Field(None, gt=0, description="Completions sampled at once; None = all of a step.")
    max_staleness: int = Field(
        0,
        ge=0,
        description="k: batch t is sampled in the background with the weights after update t-1-k, while others are "
        "trained on; 0 = each batch with the present weights. Corrected by vllm_importance_sampling_correction, which "
        "is then on (token_truncate, unless given): k > 0 is biased.",
    )
    environment: str | None = Field(
        None,
        description="What answers the model over several turns, and gives the rewards: number_guessing, tools, "
        "module:Class or file.py:Class. max_completion_length then holds all turns and answers.",
    )
    environment_options: dict[str, Any] = Field({}, description="Keywords that the environment is made with.")
    tools: list[str] = Field(
        [],
        description="Functions that the model may call through its chat template: calculator, python (in the sandbox), "
        "module:function or file.py:function, with type hints and a docstring. max_completion_length then holds all "
        "turns and answers.",
    )
    environment_factory: str | dict[str, str] | None = Field(
        None,
        description="module:Class or file.py:Class of an object for each episode: reset(**row) begins it, its other "
        "public methods are tools, and reward functions get it as `environments`. Several by name, {name: ...}: the "
        "column `environment` of a row says which.",
    )
    mcp_servers: dict[str, Any] = Field(
        {},
        description="MCP servers whose tools the model may call, by name: {command: ..., args: [...], env: {...}} "
        "starts one here, {url: ...} is one that runs.",
    )
    max_tool_calling_iterations: int | None = Field(
        None, gt=0, description="Rounds of calls and answers in an episode at most; None = max_turns - 1."
    )
    tool_timeout: float = Field(
        10.0, gt=0, description="Seconds for a call of a tool; then the model reads that it took too long."
    )
    max_turns: int = Field(
        8, gt=0, description="Turns of the model in an episode at most; then it counts as truncated."
    )
    max_turn_length: int | None = Field(
        None, gt=0, description="Longest turn in tokens; None = what is left of max_completion_length."
    )
    vllm_mode: Literal["server", "colocate"] = Field(
        "server",
        description="Where vLLM runs: server = processes of its own, on this machine or others; colocate = in the "
        "trainer's process and on its device, which needs vllm in this environment and copies weights in memory.",
    )
    vllm_enable_sleep_mode: bool = Field(
        False,
        description="Give back the GPU memory of a colocated vLLM (weights, keys and values) whenever it has sampled.",
    )
    vllm_enable_lora: bool = Field(
        False,
        description="Bring servers the LoRA adapter alone; their frozen weights never move. Servers that already run "
        "need --enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.",
    )
    vllm_urls: list[str] = Field([], description="Servers of engine vllm that already run; [] = start one here.")
    vllm_python: str | None = Field(
        None, description="Python of an environment with vllm, to start the server; None = this one."
    )
    vllm_gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="Share of the GPU's memory that the started server or a colocated vLLM takes."
    )
    vllm_tensor_parallel_size: int = Field(1, gt=0, description="GPUs of the started server.")
    vllm_max_model_length: int | None = Field(
        None, gt=0, description="Prompt and completion at most, in a vLLM that the run starts; None = the model's."
    )
    vllm_options: dict[str, Any] = Field({}, description="Further flags of a vLLM that the run starts: name and value.")
    vllm_server_timeout: float = Field(240.0, gt=0, description="Seconds until a server has to answer.")
    vllm_request_timeout: float = Field(600.0, gt=0, description="Seconds for one prompt's completions.")
    vllm_max_logp_gap: float | None = Field(
        None,
        gt=0,
        description="Mean |log-probability of vLLM - of the trainer| that stops the run, nats a token; None = "
        "1e-4 in float32, 0.05 in half precision.",
    )

    @property
    def calls_tools(self) -> bool:
        """Whether the model may call tools through its chat template."""
        return bool(self.tools or self.mcp_servers or self.environment_factory is not None)
