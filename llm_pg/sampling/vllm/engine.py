"""The `vllm` engine: completions from one or more vLLM servers that follow the trainer's weights.

Every batch is checked before it is used: a few completions of each server are scored by the trainer, and a server that
computes with other weights, or reports another distribution, ends the run with a sentence about which. Weights go by
files and vLLM's `reload_weights`, which needs a folder that trainer and servers both see.

Departures: a prompt is one request for its G completions, seeded by the key of its first row (vLLM adds the sample's
number), so a row depends on that key and its place in the group. vLLM in the trainer's own process (sleep mode) and
weights over NCCL are not there.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import StopStringCriteria

from ...model.attention import core_of
from ..protocol import Completions, SamplingParams
from .answers import Answer, read, request
from .client import Client
from .compare import Sampled, gap, suspects
from .errors import EngineError
from .pool import Pool
from .server import LocalServer, find_python
from .weights import FILE, fingerprint, tensors, write_model, write_weights

PROMPTS_AT_ONCE = 64  # requests in flight per server; each is a whole group
CHECKED_ROWS = 2  # of each server and batch
# Mean |Δ log-probability|, nats a token: rounding stays below, weights of another step are above (in half precision a
# small step hides in the rounding).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_OTHERWISE = 0.05


@dataclass(frozen=True)
class Settings:
    """How servers are found or started.

    urls: servers that already run; none = start one here. python: of an environment with vllm, to start it. dtype: of
    the served weights; None = the model's. options: further flags of vLLM. start_timeout: seconds until it answers.
    request_timeout: seconds for one prompt's completions. tolerance: None = by dtype.
    """

    urls: Sequence[str] = ()
    python: str | None = None
    dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    start_timeout: float = 240.0
    request_timeout: float = 600.0
    tolerance: float | None = None


class VllmSampler:
    """A `Sampler` over vLLM servers; a context manager that starts its own server on entry and stops it on exit.

    Args:
        model: in training; its weights are served as they stand at each call of `sample`.
        tokenizer: for the pad id and stop strings; served with the model.
        eos_ids: ids that end a completion.
        rows_at_once: completions in flight; None = as many prompts as the servers batch.
        settings: which servers. folder: for weights and log, seen by the servers too; None = a temporary one.
        say: prints one line.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        rows_at_once: int | None = None,
        *,
        settings: Settings | None = None,
        folder: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.pad_id, self.eos_ids, self.rows_at_once = int(tokenizer.pad_token_id), tuple(eos_ids), rows_at_once
        self.settings = settings or Settings()
        self.dtype = self.settings.dtype or core_of(model).dtype
        given = self.settings.tolerance
        self.tolerance = TOLERANCE.get(self.dtype, TOLERANCE_OTHERWISE) if given is None else given
        self.num_tokens = int(core_of(model).get_input_embeddings().weight.shape[0])
        self.say = say or _to_stderr
        self.last_gap: float | None = None  # nats a token, of the last batch's check
        self.syncs = 0
        self._python = None if self.settings.urls else find_python(self.settings.python)
        self._given_folder = folder
        self._local: LocalServer | None = None
        self._pool: Pool | None = None
        self._served: tuple[int, ...] | None = None  # fingerprint of what the servers hold
        self._written: tuple[int, ...] | None = None  # and of the newest folder
        self._weights: list[Path] = []  # folders of the last two states written, oldest first

    def __enter__(self) -> VllmSampler:
        """Write the folder that servers start from, and start one unless some were given, without waiting for it."""
        if self._pool is not None:
            return self
        self.folder = (self._given_folder or Path(tempfile.mkdtemp(prefix="llm_pg-vllm-"))).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self.folder / "model"
        write_model(start, self.model, self.tokenizer, tensors(self.model, self.dtype))
        self._written, self._weights, self._ready = fingerprint(self.model), [start], False
        urls = list(self.settings.urls)
        if self._python is not None:
            log = self.folder / "server.log"
            # Where a prompt is cut into chunks, vLLM sets a seeded request's generator back, which a CPU's cannot: the
            # worker ends (0.32). A trainer on a CPU starts its server there too.
            on_cpu = core_of(self.model).device.type == "cpu"
            options = {"no-enable-chunked-prefill": on_cpu, **self.settings.options}
            self._local = LocalServer(self._python, start, log, _name(self.dtype), options)
            # The server also ends with this object and with the interpreter, whatever the caller does.
            self._end = weakref.finalize(self, self._local.stop)
            self._served, urls = self._written, [self._local.url]
        self._pool = Pool([Client(url, self.settings.request_timeout) for url in urls], say=self.say)
        return self

    def __exit__(self, *_: object) -> None:
        if self._local is not None:
            self._end()
        if self._pool is not None and self._given_folder is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._local = self._pool = self._served = None

    @torch.no_grad()
    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """See `Sampler.sample`; a row's stream is that of its group's first key and its place in the group.

        Raises:
            EngineError: no server is left, or one cannot be trained with (other weights, ids or log-probabilities).
        """
        _check_params(params)
        self.__enter__()
        assert self._pool is not None
        self._wait()
        salt = self._sync()
        keys = keys_B.view(len(prompt_ids), num_generations)[:, 0].tolist()

        def complete(place: int) -> tuple[list[Answer], str]:
            prompt, seed = prompt_ids[place], keys[place] & (2**62 - 1)
            body = request(prompt, num_generations, params, self.eos_ids, seed, salt)
            shape = (prompt, num_generations, params, self.eos_ids, self.num_tokens)
            assert self._pool is not None
            return self._pool.ask("/v1/completions", body, lambda answer: read(answer, *shape))

        at_once = PROMPTS_AT_ONCE * len(self._pool.members)
        if self.rows_at_once is not None:
            at_once = max(self.rows_at_once // num_generations, 1)
        try:
            with ThreadPoolExecutor(min(at_once, len(prompt_ids))) as threads:
                groups = list(threads.map(complete, range(len(prompt_ids))))
        except EngineError as error:
            raise self._with_log(error) from None
        self._check(prompt_ids, groups, params)
        return self._completions([answer for answers, _ in groups for answer in answers], params)

    # --- weights

    def _wait(self) -> None:
        if self._ready:
            return
        if self._local is not None:
            self._local.wait(self.settings.start_timeout)
        else:
            assert self._pool is not None
            self._pool.wait(self.settings.start_timeout, f"they start from {self.folder / 'model'}")
        self._ready = True

    def _sync(self) -> str:
        """Bring the servers to the model's weights where they changed; a name for this state of them."""
        assert self._pool is not None
        present = fingerprint(self.model)
        if present != self._written:
            # Two folders in turns: the one before stays, to tell which of its weights a server kept.
            folder = self.folder / f"weights-{self.syncs % 2}"
            write_weights(folder, tensors(self.model, self.dtype))
            self._written, self._weights = present, [*self._weights, folder][-2:]
        if present != self._served:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights[-1])}}
            try:
                self._pool.tell_all("/collective_rpc", body)
            except EngineError as error:
                raise self._with_log(error) from None
            self._served = present
            self.syncs += 1
        return f"{abs(hash(present)):x}"

    def _check(
        self, prompt_ids: Sequence[Sequence[int]], groups: Sequence[tuple[list[Answer], str]], params: SamplingParams
    ) -> None:
        """Score a few completions of each server here. EngineError where the two disagree."""
        by_server: dict[str, list[Sampled]] = {}
        for prompt, (answers, url) in zip(prompt_ids, groups, strict=True):
            rows = by_server.setdefault(url, [])
            if len(rows) < CHECKED_ROWS:
                rows.append(Sampled(prompt, answers[0].ids, answers[0].logp))
        found = {url: gap(self.model, rows, params) for url, rows in by_server.items()}
        self.last_gap = max(found.values())
        for url, value in found.items():
            if not value <= self.tolerance:
                raise EngineError(
                    f"The log-probabilities of the vLLM server {url} differ from the trainer's by {value:.3g} nats a "
                    f"token on average ({self.tolerance:g} is allowed), {self._when()}. "
                    f"{self._explain(by_server[url], params)}"
                )

    def _when(self) -> str:
        return f"after weight sync {self.syncs}" if self.syncs else "with the weights it was started with"

    def _explain(self, rows: Sequence[Sampled], params: SamplingParams) -> str:
        advice = (
            f"A server of your own must be started from {self.folder / 'model'}, where embeddings are untied, with "
            "--logprobs-mode processed_logprobs, must see the run's folder, and must serve this run alone."
        )
        if len(self._weights) < 2:
            return advice
        # The weights themselves, not the newest file: what is missing there is what a server keeps.
        old, new = load_file(self._weights[0] / FILE), tensors(self.model, self.dtype)
        told = suspects(self._merged(new), rows, params, new, old, self.tolerance)
        return told if self._local is not None else f"{told} {advice}"

    def _merged(self, values: dict[str, Tensor]) -> Any:
        """The model without adapters, which `values` are the weights of."""
        core = core_of(self.model)
        if isinstance(self.model, FSDPModule):  # which cannot be copied, as weights in shards cannot
            twin = type(core)(core.config).to(core.get_input_embeddings().weight)
            twin.load_state_dict(values, strict=False)
            return twin
        return core if core is self.model else copy.deepcopy(self.model).merge_and_unload()

    def _with_log(self, error: EngineError) -> EngineError:
        return error if self._local is None else EngineError(f"{error} {self._local.told()}")

    # --- rows

    def _completions(self, rows: Sequence[Answer], params: SamplingParams) -> Completions:
        device = core_of(self.model).get_input_embeddings().weight.device
        width = max(len(row.ids) for row in rows)
        tokens_BT = torch.tensor([row.ids + [self.pad_id] * (width - len(row.ids)) for row in rows])
        logp_BT = torch.tensor([row.logp + [0.0] * (width - len(row.ids)) for row in rows], dtype=torch.float32)
        length_B = torch.tensor([len(row.ids) for row in rows])
        ended_B = torch.tensor([row.ended for row in rows])
        if params.stop:
            # The server matches its own text; here the same rule as in the other engines decides.
            criteria = StopStringCriteria(self.tokenizer, list(params.stop))
            hit_BT = torch.stack([criteria(tokens_BT[:, : t + 1], None).cpu() for t in range(width)], 1)
            first_B = torch.where(hit_BT.any(1), hit_BT.long().argmax(1) + 1, width + 1)
            ended_B |= first_B <= length_B
            length_B = torch.minimum(length_B, first_B)
        width = int(length_B.max())
        mask_BT = torch.arange(width) < length_B.unsqueeze(1)
        tokens_BT = torch.where(mask_BT, tokens_BT[:, :width], self.pad_id)
        made = Completions(tokens_BT, mask_BT, logp_BT[:, :width] * mask_BT, ~ended_B)
        return Completions(*(x.to(device) for x in vars(made).values()))


def _check_params(params: SamplingParams) -> None:
    if params.greedy and (params.temperature != 1.0 or params.truncates_support):
        raise ValueError(
            "Greedy completions of vLLM have the log-probabilities of the whole distribution at temperature 1; leave "
            "temperature, top_k, top_p and min_p at their defaults beside greedy."
        )
    if params.min_p and params.top_p < 1.0:
        raise ValueError(
            f"min_p {params.min_p} and top_p {params.top_p} together: vLLM applies min_p before top_p and this package "
            "after it, as transformers does, so another distribution would be sampled than trained. Use one of them."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
