"""Where the policy comes from: a hub id, a local folder, or a small model made on the spot; and its tokenizer."""

from __future__ import annotations

import contextlib
import json
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ..config import ConfigError
from ..config.load import check_model
from ..config.schema import ModelConfig
from .adapters import in_four_bits, keep_four_bits_differentiable, lora_config, wrap
from .attention import core_of
from .precision import HALF, half_type

_CHARACTERS = "\n" + "".join(c for c in string.printable if c.isprintable())
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, with a pad token (the end token where it has none of its own)."""
    check_model(config)
    if config.make is not None:
        return character_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _not_found(config, error) from None
    return prepare_tokenizer(tokenizer)


def prepare_tokenizer(tokenizer: Any) -> Any:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "The tokenizer has no end token (eos_token), so no completion could ever end. Set tokenizer.eos_token and "
            "save it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, tokenizer: Any, *, seed: int, peft_config: Any = None) -> Any:
    """The causal LM in float32 or the type asked for, dropout off unless `disable_dropout` is false.

    peft_config: of peft, for a new adapter.
    """
    check_model(config)
    four = in_four_bits(config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    extra = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    if config.make is not None:
        made = _make_model(config.make, tokenizer, seed, **extra).to(dtype)
        return prepare_model(made, tokenizer, config, peft_config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **extra,
            **four,
        )
    except (OSError, ValueError) as error:
        raise _not_found(config, error) from None
    return prepare_model(model, tokenizer, config, peft_config)


def incoming_half(model: Any, config: ModelConfig) -> torch.dtype | None:
    """Returns the 16-bit type that the model comes in, None = a wider one; before anything is loaded.

    model: as a trainer is given it: an object, a hub id or folder, or None for the config's own. A hub model of dtype
    auto comes as its config.json says; one without that word is found out when it is loaded.
    """
    if model is not None and not isinstance(model, (str, Path)):
        return half_type(model)
    dtype: Any = config.dtype
    if dtype == "auto":
        if config.make is not None and model is None:
            return None
        try:
            given = AutoConfig.from_pretrained(
                model or config.model_name_or_path, revision=config.model_revision, trust_remote_code=False
            )
        except (OSError, ValueError):
            return None  # loading tells what is wrong
        dtype = getattr(given.get_text_config(), "dtype", None) or getattr(given, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if dtype in HALF else None


def prepare_model(model: Any, tokenizer: Any, config: ModelConfig, peft_config: Any = None) -> Any:
    """The model as a run takes it: with the new adapter of the config or of `peft_config`, dropout as the config says.

    Raises ConfigError where the tokenizer belongs to another model, or the adapter cannot be added.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows: they do not belong "
            "together. Name a matching tokenizer, or resize the embeddings and save the model first."
        )
    if config.use_peft:
        model = wrap(model, lora_config(config))
    if peft_config is not None:
        model = wrap(model, peft_config)
    if config.disable_dropout:
        disable_dropout(model)
    keep_four_bits_differentiable(model)
    return model


# In a name: what of a module or config is drawn at random while training. (Routers of Mixtral and Phi add noise.)
_AT_RANDOM = ("dropout", "pdrop", "layerdrop", "drop_path", "jitter_noise")


def disable_dropout(model: Any) -> None:
    """Every dropout to 0, of modules, adapters and config, so that a log-probability is a function of the weights."""
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0
        _silence(vars(module))
    core = core_of(model)
    for config in (core.config, core.config.get_text_config()):
        _silence(vars(config))


def _silence(values: dict[str, Any]) -> None:
    """Numbers named as a dropout to 0; in adapters of peft they are numbers by the adapter's name."""
    for name, value in values.items():
        if name.endswith(_AT_RANDOM):
            if isinstance(value, float):
                values[name] = 0.0
            elif type(value) is dict:
                _silence_all(value)


def _silence_all(by_adapter: dict[str, Any]) -> None:
    by_adapter.update({key: 0.0 for key, value in by_adapter.items() if isinstance(value, float)})


def context_length(model: Any) -> int | None:
    """Tokens that the model can read, prompt and completion together; None where it does not say."""
    longest: int | None = getattr(core_of(model).config.get_text_config(), "max_position_embeddings", None)
    return longest


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's end token and those of the generation config."""
    ids = {int(tokenizer.eos_token_id)}
    extra = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update([extra] if isinstance(extra, int) else extra or [])
    return tuple(sorted(ids))


def generation_stub(config: ModelConfig) -> Any:
    """What `end_token_ids` reads of a model that is not loaded: an object with its generation config, or None."""
    found = None
    if config.make is None:
        with contextlib.suppress(OSError):  # a model without that file has the end token of its tokenizer
            found = GenerationConfig.from_pretrained(config.model_name_or_path, revision=config.model_revision)
    return SimpleNamespace(generation_config=found)


def context_length_before(config: ModelConfig) -> int | None:
    """`context_length` of a model that is not loaded; None too where its folder or sizes do not say.

    An adapter's folder names its model, and loading tells what is wrong with any other.
    """
    if config.make is not None:
        longest: int | None = config.make.get("max_position_embeddings")
        return longest
    try:
        found = AutoConfig.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    longest = getattr(found.get_text_config(), "max_position_embeddings", None)
    return longest


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single printable characters, with <pad>, <eos>, <unk> and a plain chat template."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *_CHARACTERS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _make_model(make: dict[str, Any], tokenizer: Any, seed: int, **extra: Any) -> Any:
    sizes = {k: v for k, v in make.items() if k != "model_type"}
    sizes.setdefault("vocab_size", len(tokenizer))
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        config = AutoConfig.for_model(make["model_type"], **sizes, **tokens)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"model.make {json.dumps(make)} makes no transformers config: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **extra)


def _not_found(config: ModelConfig, error: Exception) -> ConfigError:
    first = " ".join(str(error).split())[:300]
    return ConfigError(
        f"Model {config.model_name_or_path!r} could not be loaded: not a local folder, and the hub gave no "
        f"answer that helps ({first}). Check the name and the network, or give a local folder."
    )


def default_device() -> str:
    """The accelerator where there is one."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
