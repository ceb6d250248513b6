"""Hooks of mkdocs (see mkdocs.yml): the files outside docs/ that belong to the site, and notebooks as pages.

`<!-- test: ... -->` comments, which tell tests/docs how to run a block, are left out of the pages.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "recipes/benchmarks/RESULTS.md": "results.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that docs/ does not hold."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / "recipes" / "benchmarks").glob("*.svg")):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leaves out the comments for tests, and leads links to files outside docs/ to their pages."""
    text = re.sub(r"^<!-- test: .* -->\n", "", markdown, flags=re.MULTILINE)
    for source, page in OUTSIDE.items():
        text = text.replace(f"](../{source}", f"]({page}")
    return text


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its cells in order, stored outputs below their code."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts += [f"```python\n{source}\n```", *map(_output, cell["outputs"])]
        else:
            parts.append(source)
    parts.insert(1, f"[Download this notebook]({path.name})")
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
