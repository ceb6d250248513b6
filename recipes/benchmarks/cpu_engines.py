"""Engines of others that are made for CPUs, for decode.py. Each is optional.

CTranslate2: `pip install --target FOLDER --no-deps ctranslate2` and FOLDER on PYTHONPATH.
llama.cpp: likewise `llama-cpp-python`, which builds it for this processor. Its model is a GGUF file, which
`convert_hf_to_gguf.py` of a checkout of llama.cpp makes of a model's folder.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_pg.sampling.protocol import Completions, SamplingParams
from llm_pg.sampling.random import draw, uniform


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
        return _completions([out.sequences_ids[0] for out in done], params, self.pad_id)


class LlamaCpp:
    """A GGUF file of the model in llama.cpp: each prompt computed once, its cache copied to its rows.

    Draws are those of the native engine, of the same streams: its own samplers sort 64 vocabularies a token.

    Args:
        gguf: file. rows, tokens: the most rows of a batch, and the most tokens of a row with its prompt.

    Raises:
        ImportError: llama_cpp is not installed. RuntimeError: it cannot load the file.
    """

    def __init__(self, gguf: str, eos_ids: Sequence[int], pad_id: int, rows: int, tokens: int) -> None:
        import llama_cpp

        self.lib, self.eos_ids, self.pad_id = llama_cpp, set(eos_ids), pad_id
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = rows * tokens, rows, False
        options.n_batch, options.n_ubatch = rows * tokens, 512
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(rows * tokens, 0, 1)

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, keys_B: torch.Tensor
    ) -> Completions:
        self.lib.llama_memory_clear(self.memory, True)
        first_PV = self._logits(self._of_prompts(prompt_ids, num_generations))
        for row in range(len(prompt_ids) * num_generations):
            if row % num_generations:
                self.lib.llama_memory_seq_cp(self.memory, row - row % num_generations, row, -1, -1)
        logits = first_PV.repeat_interleave(num_generations, 0)
        rows: list[list[int]] = [[] for _ in keys_B]
        live = list(range(len(rows)))
        for depth in range(params.max_completion_length):
            uniforms = uniform(keys_B[live], torch.full((len(live),), depth))
            drawn = draw(logits / params.temperature, uniforms).tolist()
            for row, token in zip(live, drawn, strict=True):
                rows[row].append(token)
            live = [row for row in live if rows[row][-1] not in self.eos_ids]
            if not live or depth == params.max_completion_length - 1:
                break
            lengths = [len(prompt_ids[row // num_generations]) + depth for row in live]
            logits = self._logits((rows[r][-1], n, r, True) for r, n in zip(live, lengths, strict=True))
        return _completions(rows, params, self.pad_id)

    @staticmethod
    def _of_prompts(prompt_ids: Sequence[Sequence[int]], group: int) -> Iterator[tuple[int, int, int, bool]]:
        for place, ids in enumerate(prompt_ids):
            for position, token in enumerate(ids):
                yield token, position, place * group, position == len(ids) - 1

    def _logits(self, tokens: Iterator[tuple[int, int, int, bool]]) -> torch.Tensor:
        """Of (token, position, row, whether its logits are wanted): the logits wanted, in this order."""
        count = wanted = 0
        for token, position, row, is_wanted in tokens:
            self.batch.token[count], self.batch.pos[count], self.batch.logits[count] = token, position, is_wanted
            self.batch.n_seq_id[count], self.batch.seq_id[count][0] = 1, row
            count, wanted = count + 1, wanted + is_wanted
        self.batch.n_tokens = count
        if self.lib.llama_decode(self.context, self.batch):
            raise RuntimeError("llama.cpp found no room for a batch")
        address = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.c_void_p).value
        buffer = (ctypes.c_float * (wanted * self.vocabulary)).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.float32).view(wanted, self.vocabulary)


def _completions(rows: Sequence[Sequence[int]], params: SamplingParams, pad_id: int) -> Completions:
    """Without log-probabilities, which these engines do not return."""
    length_B = torch.tensor([len(row) for row in rows])
    tokens_BT = torch.full((len(rows), int(length_B.max())), pad_id)
    mask_BT = torch.arange(tokens_BT.shape[1]) < length_B.unsqueeze(1)
    tokens_BT[mask_BT] = torch.tensor([i for row in rows for i in row])
    return Completions(tokens_BT, mask_BT, torch.zeros(mask_BT.shape), length_B == params.max_completion_length)
