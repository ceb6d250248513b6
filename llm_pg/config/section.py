"""What all sections of a config have in common: closed, typed, checked when set."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from ..words import choices, words_of

TAKES_ADDRESS = {"surrogate"}  # a word, or file.py:function
MAY_BE_EMPTY = {"system_prompt"}  # an empty one stops a chat template from adding its own


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _check_words(cls, value: Any, info: ValidationInfo) -> Any:
        """One word where a list is wanted is a list of one (`report_to=wandb`). A word that the setting does not know
        is refused with the nearest one, and so is a text without a character."""
        name = str(info.field_name)
        annotation = cls.model_fields[name].annotation
        value = [value] if isinstance(value, str) and get_origin(annotation) is list else value
        known = words_of(annotation)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            is_address = name in TAKES_ADDRESS and isinstance(each, str) and ":" in each
            if known and isinstance(each, str) and each not in known and not is_address:
                raise ValueError(choices(each, known))
            if each == "" and name not in MAY_BE_EMPTY:
                raise ValueError("it has a text without a character. Leave the setting out, or fill the text in.")
        return value
