"""The `vllm` engine: completions from vLLM, in servers or in this process, which follows the trainer's weights.

Every batch is checked before it is used: a few completions of each vLLM are scored by the trainer, and one that
computes with other weights, or reports another distribution, ends the run with a sentence about which.

Departures: a prompt is one request for its G completions, seeded by the key of its first row (vLLM adds the sample's
number), so a row depends on that key and its place in the group.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria

from ...config.engines import ENGINES
from ...distributed.tensors import can_be_copied
from ...model.attention import core_of
from ..protocol import Completions, SamplingParams
from .adapter_servers import AdapterServers, check_adapter
from .answers import Answer, Ask
from .colocated import Colocated, check_colocated
from .compare import Sampled, gap, suspects
from .errors import EngineError
from .host import Host
from .server import find_python
from .servers import Servers
from .settings import Settings
from .weights import fingerprint, tensors

CHECKED_ROWS = 2  # of each vLLM and batch


class VllmSampler:
    """A `Sampler` over vLLM; a context manager that starts its own on entry and stops it on exit.

    Args:
        model: in training; its weights are served as they are at each call of `sample`.
        tokenizer: for the pad id and stop strings; served with the model.
        eos_ids: ids that end a completion.
        rows_at_once: completions in flight; None = as many prompts as vLLM batches.
        settings: where it runs. folder: for weights and log, seen by servers too; None = a temporary one.
        say: prints one line.
    """

    capabilities = ENGINES["vllm"]

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
        self.tolerance = self.settings.tolerance_of(self.dtype)
        self.num_tokens = int(core_of(model).get_input_embeddings().weight.shape[0])
        self.say = say or _to_stderr
        self.last_gap: float | None = None  # nats a token, of the last batch's check
        self.syncs = 0
        self._python: str | None = None
        if self.settings.adapters:
            check_adapter(model)
        if self.settings.colocated:
            check_colocated(core_of(model).device, self.settings)
        elif not self.settings.urls:
            self._python = find_python(self.settings.python)
        self._given_folder = folder
        self.host: Host | None = None

    def __enter__(self) -> VllmSampler:
        """Start it, without waiting for a server."""
        if self.host is not None:
            return self
        self.folder = (self._given_folder or Path(tempfile.mkdtemp(prefix="llm_pg-vllm-"))).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        where: dict[str, Any] = {"dtype": self.dtype, "rows_at_once": self.rows_at_once}
        if self.settings.colocated:
            self.host = Colocated(self.tokenizer, self.folder, self.settings, **where)
        else:
            where |= {"python": self._python, "say": self.say}
            kind = AdapterServers if self.settings.adapters else Servers
            self.host = kind(self.tokenizer, self.folder, self.settings, **where)
        try:
            self.host.start(self.model, fingerprint(self.model))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.host is not None:
            self.host.stop()
            if self._given_folder is None:
                shutil.rmtree(self.folder, ignore_errors=True)
        self.host = None

    @torch.no_grad()
    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: Tensor
    ) -> Completions:
        """See `SamplingEngine.sample`; a row's stream is that of its group's first key and its place in the group.

        Raises:
            EngineError: no vLLM is left, or one cannot be trained with (other weights, ids or log-probabilities).
        """
        _check_params(params)
        self.__enter__()
        assert self.host is not None
        self.host.wait()
        first_P = keys_B.view(len(prompt_ids), num_generations)[:, 0].tolist()
        try:
            fixed = (num_generations, params, self.eos_ids, self.num_tokens)
            salt = self._sync(self.host)
            asks = [
                Ask(prompt, *fixed, seed=key & (2**62 - 1), salt=salt)
                for prompt, key in zip(prompt_ids, first_P, strict=True)
            ]
            groups = self.host.complete(asks)
        except EngineError as error:
            raise self.host.explained(error) from None
        self._check(prompt_ids, groups, params)
        return self._completions([answer for answers, _ in groups for answer in answers], params)

    # --- weights

    def _sync(self, host: Host) -> str:
        """Bring it to the model's weights where they changed; a name for this state of them."""
        present = fingerprint(self.model)
        if present != host.served:
            host.load(self.model, present)
            self.syncs += 1
        return f"{abs(hash(present)):x}"

    def _check(
        self, prompt_ids: Sequence[Sequence[int]], groups: Sequence[tuple[list[Answer], str]], params: SamplingParams
    ) -> None:
        """Score a few completions of each vLLM here. EngineError where the two disagree."""
        by_name: dict[str, list[Sampled]] = {}
        for prompt, (answers, name) in zip(prompt_ids, groups, strict=True):
            rows = by_name.setdefault(name, [])
            if len(rows) < CHECKED_ROWS:
                rows.append(Sampled(prompt, answers[0].ids, answers[0].logp))
        found = {name: gap(self.model, rows, params) for name, rows in by_name.items()}
        self.last_gap = max(found.values())
        for name, value in found.items():
            if not value <= self.tolerance:
                raise EngineError(
                    f"The log-probabilities of {name} differ from the trainer's by {value:.3g} nats a token on average "
                    f"({self.tolerance:g} is allowed), {self._when()}. {self._explain(by_name[name], params)}"
                )

    def _when(self) -> str:
        return f"after weight sync {self.syncs}" if self.syncs else "with the weights it was started with"

    def _explain(self, rows: Sequence[Sampled], params: SamplingParams) -> str:
        assert self.host is not None
        old = self.host.older()
        if old is None:
            return self.host.advice
        # The weights themselves, not what was last given: what is missing there is what vLLM keeps.
        new = tensors(self.model, self.dtype)
        reported = suspects(self._merged(new), rows, params, new, old, self.tolerance)
        return f"{reported} {self.host.advice}".rstrip()

    def _merged(self, values: dict[str, Tensor]) -> Any:
        """The model without adapters, which `values` are the weights of."""
        core = core_of(self.model)
        if not can_be_copied(self.model):
            twin = type(core)(core.config).to(core.get_input_embeddings().weight)
            twin.load_state_dict(values, strict=False)
            return twin
        return core if core is self.model else copy.deepcopy(self.model).merge_and_unload()

    # --- rows

    def _completions(self, rows: Sequence[Answer], params: SamplingParams) -> Completions:
        device = core_of(self.model).get_input_embeddings().weight.device
        width = max(len(row.ids) for row in rows)
        tokens_BT = torch.tensor([row.ids + [self.pad_id] * (width - len(row.ids)) for row in rows])
        logp_BT = torch.tensor([row.logp + [0.0] * (width - len(row.ids)) for row in rows], dtype=torch.float32)
        length_B = torch.tensor([len(row.ids) for row in rows])
        ended_B = torch.tensor([row.ended for row in rows])
        if params.stop:
            # vLLM matches its own text; here the same rule as in the other engines decides.
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


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
