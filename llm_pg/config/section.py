"""What all sections of a config have in common: closed, typed, checked when set."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _one_word_is_a_list_of_one(cls, value: Any, info: ValidationInfo) -> Any:
        """`report_to=wandb` where nothing but a list can stand."""
        field = cls.model_fields[str(info.field_name)]
        return [value] if isinstance(value, str) and get_origin(field.annotation) is list else value
