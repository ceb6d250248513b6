"""docs/gallery.md lists every recipe and config that is shipped to be run, and none that there is not."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = {"curves.py"}  # what recipes draw with


def test_the_gallery_lists_every_recipe_and_config() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w.-]+)` \|", page, flags=re.MULTILINE))
    recipes = {path.name for path in (ROOT / "recipes").glob("*.py")} - HELPERS
    configs = {path.name for path in (ROOT / "configs").glob("*.yaml")} - {
        "number_guessing.yaml",
        "tool_calls.yaml",
    }  # of recipes
    assert listed == recipes | configs
