"""A module that stands for `vllm`: an `LLM` that computes with a transformers model from the weights it is given, and
notes what is asked of it, in order. What it answers has the form of vLLM 0.32's."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key


@dataclass
class Output:
    prompt_token_ids: list[int]
    outputs: list[Any]


class Module(types.ModuleType):
    """Args: make: a model as the trainer's, with other weights. fault: called with each call's name before it."""

    def __init__(self, make: Callable[[], Any], tokenizer: Any, fault: Callable[[str], None] | None = None) -> None:
        super().__init__("vllm")
        self.calls: list[tuple[str, Any]] = []
        self.fault = fault
        self.distributed = types.ModuleType("vllm.distributed")
        self.distributed.cleanup_dist_env_and_memory = lambda: self.note("cleanup", None)  # type: ignore[attr-defined]
        module = self

        class LLM:
            def __init__(self, **arguments: Any) -> None:
                module.note("LLM", arguments)
                torch.manual_seed(arguments["seed"])  # as vLLM's worker does
                torch.set_num_threads = lambda count: None
                self.model = make()
                self.weights_awake = self.kv_awake = True
                core = types.SimpleNamespace(shutdown=lambda: module.note("shutdown", None))
                self.llm_engine = types.SimpleNamespace(engine_core=core)

            def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[None]:
                assert self.weights_awake
                values = {name: x.clone() for name, x in kwargs["weights_iterator"]}
                module.note(method, sorted(values))
                self.model.load_state_dict(values)
                return [None]

            def reset_prefix_cache(self) -> bool:
                module.note("reset_prefix_cache", None)
                return True

            def sleep(self, level: int) -> None:
                module.note("sleep", level)
                self.weights_awake = self.kv_awake = False
                for p in self.model.parameters():  # level 2 drops them
                    p.data.fill_(float("nan"))

            def wake_up(self, tags: list[str]) -> None:
                module.note("wake_up", tags)
                self.weights_awake |= "weights" in tags
                self.kv_awake |= "kv_cache" in tags

            def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Output]:
                module.note("generate", len(prompts))
                assert self.weights_awake
                assert self.kv_awake
                torch.rand(3)  # its sampler draws from the process's generator too
                return [
                    complete(self.model, tokenizer, prompt["prompt_token_ids"], asked)
                    for prompt, asked in zip(prompts, params, strict=True)
                ]

        self.LLM = LLM
        self.SamplingParams = types.SimpleNamespace

    def note(self, name: str, what: Any) -> None:
        self.calls.append((name, what))
        if self.fault is not None:
            self.fault(name)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def complete(model: Any, tokenizer: Any, prompt: list[int], asked: Any) -> Output:
    params = SamplingParams(
        temperature=asked.temperature or 1.0,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        greedy=asked.temperature == 0.0,
        max_completion_length=asked.max_tokens,
    )
    sampler = NativeSampler(model, tokenizer, asked.stop_token_ids)
    done = sampler.sample([prompt], asked.n, params, stream_key(asked.seed, torch.arange(asked.n)))
    outputs = []
    for i in range(asked.n):
        ids, logp = done.tokens_BT[i][done.mask_BT[i]].tolist(), done.logp_BT[i][done.mask_BT[i]].tolist()
        outputs.append(
            types.SimpleNamespace(
                index=i,
                token_ids=ids,
                logprobs=[{t: types.SimpleNamespace(logprob=x)} for t, x in zip(ids, logp, strict=True)],
                finish_reason="length" if done.truncated_B[i] else "stop",
            )
        )
    return Output(prompt, outputs)
