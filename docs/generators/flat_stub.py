"""Prints `llm_pg/config/flat.pyi`, or writes it to a file that is named: the flat configs as an editor sees them, every
setting and every argument of TRL with its type, default and description, from the tables that the configs read."""

from __future__ import annotations

import re
from typing import Any

from publish import publish

from llm_pg.config import flat
from llm_pg.config.schema import LEAVES, Config
from llm_pg.config.trl import FACTS, WORDS

HEAD = """# Made by docs/generators/flat_stub.py from the tables of settings; do not edit.
from typing import Any, ClassVar, Literal, TypedDict, Union

from typing_extensions import Unpack

from pydantic.fields import FieldInfo

from .schema import Config

"""
_METADATA = re.compile(r"typing\.Annotated\[([^,\]]+)(?:, [^\]]*)?\]")


def leaf(name: str) -> Any:
    """The field of a setting."""
    section: Any = Config.model_fields[LEAVES[name]].annotation
    return section.model_fields[name]


def type_text(annotation: Any) -> str:
    """An annotation as it is written, without the bounds of numbers."""
    plain = isinstance(annotation, type) and not hasattr(annotation, "__args__")
    text = annotation.__name__ if plain else str(annotation)
    text = _METADATA.sub(r"\1", text).replace("pathlib.Path", "Any")
    while (inner := re.search(r"typing\.Optional\[((?:[^\[\]]|\[[^\[\]]*\])*)\]", text)) is not None:
        text = f"{text[: inner.start()]}{inner[1]} | None{text[inner.end() :]}"
    return text.replace("typing.", "").replace("NoneType", "None").replace("'", '"')


def arguments() -> dict[str, str]:
    """Name -> type of every keyword, the settings first."""
    own = {name: type_text(leaf(name).annotation) for name in LEAVES if name != "output_dir"}
    return {**own, "algorithm": "str", **{name: "Any" for name in WORDS if name not in own and name != "output_dir"}}


def stub() -> str:
    keywords, sections = arguments(), set(Config.model_fields)
    attributes = {name: kind for name, kind in keywords.items() if name not in sections}
    made = "    def __init__(self, output_dir: str | None = None, **settings: Unpack[Settings]) -> None: ..."
    lines = [
        HEAD,
        "class Settings(TypedDict, total=False):",
        *(f"    {name}: {kind}" for name, kind in keywords.items()),
    ]
    # Not a model of pydantic's: its fields would be arguments that must be given.
    lines += ["", "class Attributes:", *(f"    {name}: {kind}" for name, kind in attributes.items())]
    lines += [*(f"    {name}: Any" for name in FACTS if name not in attributes), "    output_dir: str", ""]
    lines += ["class FlatConfig(Attributes, Config):", "    _algorithm: ClassVar[str]", made]
    lines += [
        "    @classmethod",
        "    def own_fields(cls) -> dict[str, FieldInfo]: ...",
        "    def __post_init__(self) -> None: ...",
    ]
    lines += ["    def to_dict(self) -> dict[str, Any]: ...", "    def to_json_string(self) -> str: ..."]
    lines += ["    def to_sanitized_dict(self) -> dict[str, Any]: ..."]
    lines += ["    def fit(self, num_rows: int, *, holds_out: bool) -> None: ..."]
    lines += ["    def settle(self, num_prompts: int, prompts_per_step: int) -> None: ...", ""]
    for name in ("ReinforceConfig", "RLOOConfig", "GRPOConfig", "ActorCriticConfig"):
        assert issubclass(getattr(flat, name), flat.FlatConfig)
        lines += [f"class {name}(FlatConfig):", made, ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    publish(stub())
