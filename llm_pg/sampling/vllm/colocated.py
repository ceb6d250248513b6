"""vLLM in the trainer's own process and on its device: no server, and weights that are copied in memory.

Sleep is of vLLM's level 2, which drops weights, keys and values: the trainer's own weights stand on the same device, so
a copy of vLLM's on the host (level 1) would cost memory and two trips over the bus for what is written anew anyway.

Departures: vLLM begins with random weights (load_format dummy) and gets the model's at the first batch, so that no file
of them is written. It seeds the process's generators, replaces `torch.set_num_threads` and sets variables of the
environment; all that is put back.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ...config.vllm import need_vllm
from ...model.attention import core_of
from .answers import Answer, Ask
from .errors import EngineError, Unreachable
from .host import State
from .settings import Settings, name_of
from .weights import Lately, stream, write_config

NAME = "vLLM in this process"
SLEEP_LEVEL = 2
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's
    "VLLM_CONFIGURE_LOGGING": "0",  # its lines go to the log
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the folder has everything
}
# Engines of ranks that run together, to their process's end: where one ends, vLLM ends the group of the ranks.
_KEPT: list[Any] = []
# Of a request, what vLLM's SamplingParams take; the rest is the server's.
_FIELDS = (
    *("n", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs"),
)


def check_colocated(device: torch.device, settings: Settings) -> None:
    """ValueError where vLLM cannot run in this process."""
    need_vllm(colocated=True)
    if settings.sleep and device.type != "cuda":
        raise ValueError(
            f"vllm_enable_sleep_mode gives back a GPU's memory, and the model is on {device.type}, where vLLM "
            "ignores the call. Leave vllm_enable_sleep_mode out."
        )


class Colocated:
    """A `Host` that is vLLM's `LLM` in this process.

    Args:
        tokenizer: for stop strings. folder: for config, tokenizer and log. dtype: of vLLM's weights.
        rows_at_once: sequences in a batch of vLLM's; None = its own number.
    """

    advice = "Its log names the weights that it could not load, if there are any."

    def __init__(
        self, tokenizer: Any, folder: Path, settings: Settings, *, dtype: torch.dtype, rows_at_once: int | None
    ) -> None:
        self.tokenizer, self.folder, self.settings, self.dtype = tokenizer, folder, settings, dtype
        self.rows_at_once, self.log = rows_at_once, folder / "engine.log"
        self.served: State | None = None
        self.lately = Lately()
        self.llm: Any = None
        self._asleep = False
        self._end = contextlib.ExitStack()

    def start(self, model: Any, present: State) -> None:
        """Make the engine, which takes seconds. EngineError where it cannot be made."""
        self.device = core_of(model).device
        write_config(self.folder / "model", model, self.tokenizer)
        self._end.enter_context(_log_to(self.log))
        self._own_group = not torch.distributed.is_initialized()
        with self._told("could not be started"), _undisturbed(self.device), _environment():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its import
                import vllm
                import vllm.distributed

            if self._own_group:
                self._end.callback(vllm.distributed.cleanup_dist_env_and_memory)
            self._params = vllm.SamplingParams
            self.llm = vllm.LLM(**self._arguments())
        self._sleep()

    def wait(self) -> None:
        """It is there since `start`."""

    def load(self, model: Any, present: State) -> None:
        with self._told("could not take the weights over"), _undisturbed(self.device):
            if self._asleep:
                torch.cuda.empty_cache()  # what the update left cached is what vLLM maps again
                self.llm.wake_up(tags=["weights"])
            pairs = _noted(stream(model, self.dtype), self.lately.begin(model))
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            if self._asleep:
                self.llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            # A prefix computed with other weights must not be found again.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache could not be emptied")
        self.served = present

    def complete(self, asks: Sequence[Ask]) -> list[tuple[list[Answer], str]]:
        bodies = [ask.body() for ask in asks]
        prompts = [{"prompt_token_ids": body["prompt"]} for body in bodies]
        params = [
            self._params(**{name: body[name] for name in _FIELDS}, detokenize=bool(body["stop"])) for body in bodies
        ]
        with self._told("could not complete the prompts"), _undisturbed(self.device):
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        self._sleep()
        try:
            return [(ask.read(_as_answer(output)), NAME) for ask, output in zip(asks, outputs, strict=True)]
        except Unreachable as error:  # there is nobody else to ask
            raise EngineError(f"{NAME} gave {error}.") from None

    def older(self) -> dict[str, Tensor] | None:
        return self.lately.older()

    def explained(self, error: EngineError) -> EngineError:
        return error

    def stop(self) -> None:
        """Give its memory back, and what vLLM set up in torch.distributed."""
        if self.llm is not None and self._own_group:
            self.llm.llm_engine.engine_core.shutdown()
        elif self.llm is not None:
            _KEPT.append(self.llm)
        self.llm = self.served = None
        self._end.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _sleep(self) -> None:
        if self.settings.sleep:
            self.llm.sleep(level=SLEEP_LEVEL)
            self._asleep, self.served = True, None

    def _arguments(self) -> dict[str, Any]:
        """Of `LLM`. The settings' options are named as the server's flags are, and come last."""
        asked = {name.replace("-", "_"): value for name, value in self.settings.options.items()}
        negated = {name.removeprefix("no_"): not value for name, value in asked.items() if name.startswith("no_")}
        asked = {name: value for name, value in asked.items() if not name.startswith("no_")} | negated
        sizes: dict[str, Any] = {} if self.rows_at_once is None else {"max_num_seqs": self.rows_at_once}
        if not self._own_group and torch.distributed.get_world_size() > 1:  # each rank's engine is alone on its device
            sizes["distributed_executor_backend"] = "external_launcher"
        if self.device.type == "cpu":
            sizes["enable_chunked_prefill"] = False  # see `servers.Servers.start`
        return {
            "model": str(self.folder / "model"),
            "load_format": "dummy",
            "dtype": name_of(self.dtype),
            "generation_config": "vllm",  # else the model's own top-k or penalty would be sampled and not trained
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "enable_sleep_mode": self.settings.sleep,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,  # of requests without one, which there are none of
            **sizes,
            **asked,
        }

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever vLLM raises, the run ends with a saved state
            cause = " ".join(str(error).split())[:500] or type(error).__name__
            hint = ""
            if isinstance(error, torch.OutOfMemoryError) or "memory" in cause:
                hint = " Lower vllm_gpu_memory_utilization, or set vllm_enable_sleep_mode on a GPU."
            raise EngineError(f"{NAME} {what}: {cause}.{hint} Its log is {self.log}.") from error


def _noted(pairs: Iterator[tuple[str, Tensor]], note: Callable[[str, Tensor], None]) -> Iterator[tuple[str, Tensor]]:
    for name, x in pairs:
        note(name, x)
        yield name, x


def _as_answer(output: Any) -> Mapping[str, Any]:
    """In the words of a server's /v1/completions."""
    return {
        "choices": [
            {
                "index": one.index,
                "finish_reason": one.finish_reason,
                "token_ids": list(one.token_ids),
                "logprobs": {
                    "token_logprobs": [at[i].logprob for i, at in zip(one.token_ids, one.logprobs or (), strict=False)]
                },
                "prompt_token_ids": list(output.prompt_token_ids),
            }
            for one in output.outputs
        ]
    }


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """The generators of the process and its count of threads are afterwards what they were before."""
    threads, draws, of_numpy = torch.set_num_threads, random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(draws)
            numpy.random.set_state(of_numpy)
            torch.set_num_threads = threads


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """vLLM's variables, set where they are not; others that it sets are for its own processes, and it has none here."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in before})
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before and not name.startswith("VLLM_")]:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if not name.startswith("VLLM_")})


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    logger = logging.getLogger("vllm")
    file = logging.FileHandler(path, mode="w")
    file.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
    before = logger.propagate, logger.level
    logger.addHandler(file)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(file)
        file.close()
        logger.propagate, level = before
        logger.setLevel(level)
