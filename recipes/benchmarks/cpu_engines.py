"""Engines of others that are made for CPUs, for decode.py. Each is optional.

CTranslate2: `pip install --target FOLDER --no-deps ctranslate2` and FOLDER on PYTHONPATH.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_pg.sampling.protocol import Completions, SamplingParams


class CTranslate2:
    """A converted copy of the model; draws by the engine's own generator, each row with a prompt of its own.

    Args:
        compute_type: float32 or int8. (Its bfloat16 needs a GPU or a processor of Intel's with matrix units.)

    Raises:
        ImportError: ctranslate2 is not installed.
    """

    def __init__(self, model: Any, tokenizer: Any, eos_ids: Sequence[int], compute_type: str) -> None:
        import ctranslate2

        self.tokenizer, self.eos_ids, self.pad_id = tokenizer, list(eos_ids), int(tokenizer.pad_token_id)
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "model", Path(folder) / "converted"
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
            ctranslate2.converters.TransformersConverter(str(source)).convert(str(made), quantization=compute_type)
            threads = torch.get_num_threads()
            self.generator = ctranslate2.Generator(str(made), compute_type=compute_type, intra_threads=threads)

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: torch.Tensor
    ) -> Completions:
        prompts = [
            self.tokenizer.convert_ids_to_tokens(list(ids)) for ids in prompt_ids for _ in range(num_generations)
        ]
        done = self.generator.generate_batch(
            prompts, max_length=params.max_completion_length, sampling_topk=0, sampling_temperature=params.temperature,
            include_prompt_in_result=False, end_token=self.eos_ids, return_end_token=True,
        )  # fmt: skip
        rows = [out.sequences_ids[0] for out in done]
        length_B = torch.tensor([len(row) for row in rows])
        tokens_BT = torch.full((len(rows), int(length_B.max())), self.pad_id)
        mask_BT = torch.arange(tokens_BT.shape[1]) < length_B.unsqueeze(1)
        tokens_BT[mask_BT] = torch.tensor([i for row in rows for i in row])
        return Completions(tokens_BT, mask_BT, torch.zeros(mask_BT.shape), length_B == params.max_completion_length)
