"""The process that samples ahead for the native engine: a copy of the model, which takes its weights from a slot.

Requests and answers are JSON: each is answered by {"error": text}, or by {"bytes": n} and a frame of four tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...processes.child import own_pipes
from ...processes.frames import encode, encode_bytes, read, write
from ...sampling.native import NativeSampler
from ...sampling.protocol import SamplingParams
from .weight_buffers import WeightBuffers


def main() -> None:
    """Serves the trainer until it closes the pipe; the guard ends this process with the trainer."""
    requests, answers = own_pipes()
    setup = read(requests)
    if setup is None:
        return
    sampler, buffers = _made(setup)
    state = {**dict(sampler.model.named_parameters()), **dict(sampler.model.named_buffers())}
    write(answers, encode({"ready": True}))
    while (request := read(requests)) is not None:
        try:
            payload = _sampled(sampler, state, buffers, request)
        except Exception as error:  # noqa: BLE001  reported to the trainer, which ends the run with it
            write(answers, encode({"error": f"{type(error).__name__}: {error}"}))
            continue
        write(answers, encode({"bytes": len(payload)}))
        write(answers, encode_bytes(payload))


def _made(setup: dict[str, Any]) -> tuple[NativeSampler, WeightBuffers]:
    torch.set_num_threads(setup["threads"])
    torch.set_float32_matmul_precision(setup["matmul_precision"])
    config = AutoConfig.from_pretrained(setup["folder"], local_files_only=True)
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, setup["dtype"]), attn_implementation=setup["attention"]
    )
    buffers = WeightBuffers(
        setup["handle"], [(name, dtype, shape) for name, dtype, shape in setup["layout"]], setup["count"]
    )
    types = {name: view.dtype for name, view in buffers.views[0].items()}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        x.data = x.data.to(types[name])
    model.eval()  # weights ask for a gradient, as autocast keeps the cast ones of such weights alone
    model.to(setup["device"])
    tokenizer = AutoTokenizer.from_pretrained(setup["folder"], local_files_only=True)
    products = getattr(torch, setup["products"]) if setup["products"] else None
    options = {"dtype": products, "compiled": setup["compiled"]}
    return NativeSampler(model, tokenizer, setup["eos_ids"], setup["rows_at_once"], **options), buffers


@torch.no_grad()
def _sampled(
    sampler: NativeSampler, state: dict[str, Tensor], buffers: WeightBuffers, request: dict[str, Any]
) -> bytes:
    if request["slot"] is not None:
        for name, view in buffers.views[request["slot"]].items():
            if name in state:  # a tied weight is under its first name alone
                state[name].copy_(view)
    params = SamplingParams(**{**request["params"], "stop": tuple(request["params"]["stop"])})
    keys_B = torch.tensor(request["keys"], dtype=torch.int64)
    done = sampler.sample(request["prompts"], request["num_generations"], params, keys_B)
    return save({name: x.cpu().contiguous() for name, x in vars(done).items()})
