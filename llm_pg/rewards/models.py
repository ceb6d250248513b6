"""A reward model: a sequence classifier with one output, as TRL takes it. torch is loaded with the model.

It runs in the trainer's process, on the trainer's device, in passes of `batch_size` texts. Scores are those of TRL: the
text of prompt and completion, or their conversation in the model's own chat template, tokenized without further special
tokens and padded on the right; the first logit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BATCH = 32  # texts of a pass


def is_module(thing: Any) -> bool:
    """Whether a thing is a torch module; torch itself is not asked for."""
    return any(f"{kind.__module__}.{kind.__name__}" == "torch.nn.modules.module.Module" for kind in type(thing).__mro__)


def names_model(text: str) -> bool:
    """Whether a text that names no function is the id or the folder of a model."""
    return ("/" in text and not text.endswith(".py")) or Path(text).expanduser().is_dir()


class ModelReward:
    """A reward model as a reward function in the batch form.

    Args:
        source: hub id or folder of a sequence classifier, or a module with a transformers config.
        processing_class: its tokenizer; None = that of the same id or folder.
        chat_template_kwargs: for its chat template.

    Raises:
        ValueError: a folder that holds no sequence classifier. What only the weights or the tokenizer show is found
            when the model is loaded, by `place` or with the first completions.
    """

    def __init__(
        self, source: Any, processing_class: Any = None, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if not is_module(source):
            source = str(source)
            _check_folder(source)
        self.source, self.tokenizer = source, processing_class
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.model: Any = None

    @property
    def __name__(self) -> str:
        name = self._id() or type(self.source).__name__
        return name.rstrip("/").rpartition("/")[2]

    def _id(self) -> str:
        """Hub id or folder of the model; "" where a module does not say."""
        if isinstance(self.source, str):
            return self.source
        return str(getattr(getattr(self.source, "config", None), "_name_or_path", "") or "")

    def place(self, device: Any = None) -> None:
        """Load the model and its tokenizer, where they are not yet, and move the model to a device.

        device: None = the accelerator where there is one. Raises ValueError where it is no reward model, or its
        tokenizer cannot pad.
        """
        import torch

        if self.model is None:
            self.model = self._loaded() if isinstance(self.source, str) else self.source
            self.tokenizer = self._own_tokenizer() if self.tokenizer is None else self.tokenizer
            self._check()
            self.model.eval()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)

    def _loaded(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.source, num_labels=1, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"Reward model {self.source!r} cannot be loaded: {' '.join(str(error).split())}") from None
        missing = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
        if missing:
            raise ValueError(
                f"{self.source!r} is no reward model: its weights have no head with one output ({missing[0]} is not "
                "in them), and one drawn at random would score at random. Name a sequence classifier with num_labels=1."
            )
        return model

    def _own_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        name = self._id()
        try:
            if not name:
                raise OSError("it was given as a module without a name")
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Reward model {self.__name__} has no tokenizer: {' '.join(str(error).split())}. Give it as "
                "reward_processing_classes, one for each of reward_funcs (None for functions)."
            ) from None

    def _check(self) -> None:
        labels = getattr(getattr(self.model, "config", None), "num_labels", None)
        if labels not in (None, 1):
            raise ValueError(f"Reward model {self.__name__} has {labels} outputs, and a reward is one: num_labels=1.")
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise ValueError(f"The tokenizer of reward model {self.__name__} has neither a pad nor an end token.")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        config = getattr(self.model, "config", None)
        if config is not None:  # the model reads its score at the last token that is no pad
            config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], batch_size: int = BATCH) -> list[float]:
        """The score of each completion. prompts, completions: texts, or lists of messages."""
        import torch

        if self.model is None:
            self.place()
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        device = next(self.model.parameters()).device
        scores: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                inputs = self.tokenizer(
                    text=texts[start : start + batch_size],
                    return_tensors="pt",
                    padding=True,
                    padding_side="right",
                    add_special_tokens=False,
                )
                scores += self.model(**inputs.to(device)).logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        reported = self.tokenizer.apply_chat_template(
            [*prompt, *completion], tokenize=False, **self.chat_template_kwargs
        )
        return str(reported)


def _check_folder(source: str) -> None:
    """ValueError where a local folder holds no sequence classifier, as its config.json says."""
    path = Path(source).expanduser()
    if not path.exists() and not source.startswith((".", "/", "~")):
        return  # a hub id
    facts = path / "config.json"
    if not facts.is_file():
        raise ValueError(f"Reward model {source!r}: there is no config.json in that folder.")
    kinds = json.loads(facts.read_text(encoding="utf-8")).get("architectures") or []
    if kinds and not any("SequenceClassification" in kind for kind in kinds):
        raise ValueError(
            f"{source!r} is no reward model: it holds a {kinds[0]}, and a reward model is a sequence classifier with "
            "one output (AutoModelForSequenceClassification, num_labels=1)."
        )
