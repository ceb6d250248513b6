"""The code blocks of README and docs: found, made small as the page itself says, and run. `python tests/docs/blocks.py`
lists them.

A page's blocks run in order in one empty folder. Python blocks have a fresh namespace each; of bash and console blocks
every command is run. Comments right before a block say what differs in the test, for readers of the source to see:

    <!-- test: max_steps=2 -->                   settings: appended to llm-pg's commands, or put into ...Config(...)
    <!-- test: save mine.py -->                  the block is also written to this file; other blocks can use it
    <!-- test: given test.jsonl -->              a file of sums that the reader has and the folder lacks
    <!-- test: given gsm8k/ -->                  the same as a dataset in the hub's layout
    <!-- test: before x = 1 -->                  a line of Python that runs before the block
    <!-- test: exit 1 -->                        the exit code of the last command, where it is not 0
    <!-- test: skip pip: reason -->              commands that begin with this word are not run
    <!-- test: skip: reason -->                  the block is not run

`{model}` in a setting is the folder of a tiny model; a Trainer's model="hub/id" is replaced by it, as is
that of Policy.from_pretrained. Where a console
block shows output, each of its lines must be printed, in that order; "..." stands for any lines.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\s*$")
COMMENT = re.compile(r"^<!-- test: (.*) -->$")
INLINE = re.compile(r"`(llm-pg [^`]+)`")
TAKE_SETTINGS = ("train", "eval", "check", "quickstart")
RUN_LANGUAGES = ("python", "bash", "console", "yaml", "json")


@dataclass
class Block:
    """A fenced block with what its comments say. `line` is that of its fence."""

    page: Path
    line: int
    language: str
    text: str
    settings: dict[str, str] = field(default_factory=dict)
    save: str | None = None
    given: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    exit: int = 0
    skip: str | None = None
    skipped_commands: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    def say(self, words: str) -> None:
        """Read one comment."""
        verb, _, rest = words.partition(" ")
        if verb == "save":
            self.save = rest
        elif verb == "given":
            self.given.append(rest)
        elif verb == "before":
            self.before.append(rest)
        elif verb == "exit":
            self.exit = int(rest)
        elif words.startswith("skip: "):
            self.skip = words.removeprefix("skip: ")
        elif verb == "skip":
            command, _, reason = rest.partition(": ")
            self.skipped_commands[command] = reason
        else:
            for word in shlex.split(words):
                key, equals, value = word.partition("=")
                if not equals:
                    raise ValueError(f"{self.name}: cannot read the comment {words!r}")
                self.settings[key] = value


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_blocks(page: Path) -> list[Block]:
    blocks: list[Block] = []
    said: list[str] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if found := COMMENT.match(line):
            said.append(found[1])
        elif found := FENCE.match(line):
            text = []
            for _, inner in lines:
                if inner.startswith("```"):
                    break
                text.append(inner)
            block = Block(page, number, found[1], "\n".join(text) + "\n")
            for words in said:
                block.say(words)
            blocks.append(block)
            said = []
        elif line.strip() and said:
            raise ValueError(f"{page.name}:{number}: the comment {said[-1]!r} stands before no block")
    return blocks


def inline_commands(page: Path) -> list[str]:
    """`llm-pg ...` in running text and tables, blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [command.split(" # ")[0] for command in INLINE.findall(text)]


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Each command of a bash or console block, with the output lines shown below it."""
    text = block.text.replace("\\\n", " ")
    if block.language == "bash":
        for line in text.splitlines():
            for part in line.split(" && "):
                if part.strip() and not part.lstrip().startswith("#"):
                    yield part.strip(), []
        return
    command, shown = "", []
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
    yield command, shown


class Runner:
    """Runs the blocks of one page in one folder, which must be the working directory."""

    def __init__(self, model: Path) -> None:
        self.model = str(model)

    def run(self, block: Block) -> None:
        if block.skip is not None:
            return
        for name in block.given:
            write_hub_sums(Path(name)) if name.endswith("/") else write_sums(Path(name))
        if block.save is not None:
            Path(block.save).parent.mkdir(parents=True, exist_ok=True)
            Path(block.save).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            self._python(block)
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), block.name
        elif block.language == "json":
            assert [json.loads(line) for line in block.text.splitlines()], block.name
        else:
            codes = [self._command(command, shown, block) for command, shown in commands(block)]
            assert all(code == 0 for code in codes[:-1]), (block.name, codes)
            assert codes[-1] == block.exit, (block.name, codes)

    def _python(self, block: Block) -> None:
        tree = Smaller(self._values(block), self.model).visit(ast.parse("\n".join([*block.before, block.text])))
        code = ast.unparse(ast.fix_missing_locations(tree))
        path = Path(f"block_{block.line}.py")
        path.write_text(code, encoding="utf-8")
        runpy.run_path(str(path), run_name="__main__")

    def _values(self, block: Block) -> dict[str, str]:
        return {key: value.replace("{model}", self.model) for key, value in block.settings.items()}

    def _command(self, command: str, shown: list[str], block: Block) -> int:
        words = shlex.split(command, comments=True)
        if not words or any(command.startswith(start) for start in block.skipped_commands):
            return 0
        if words[0] == "llm-pg" and words[1] in TAKE_SETTINGS:
            words += [f"{key}={value}" for key, value in self._values(block).items()]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = self._call(words, block)
        check_shown(shown, printed.getvalue(), block.name)
        return code

    def _call(self, words: list[str], block: Block) -> int:
        from llm_pg.cli import main

        if words[0] == "llm-pg":
            return main(words[1:])
        assert words[0] == "python", f"{block.name}: {words[0]!r} is not run here; add a comment that skips it"
        before = sys.argv
        sys.argv = words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = before
        return 0


class Smaller(ast.NodeTransformer):
    """Puts settings into calls of ...Config and the tiny model into calls of ...Trainer."""

    def __init__(self, settings: dict[str, str], model: str) -> None:
        self.settings, self.model = settings, model

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name.endswith("Config") and self.settings:
            kept = [word for word in node.keywords if word.arg not in self.settings]
            given = [ast.keyword(key, ast.Constant(yaml.safe_load(text))) for key, text in self.settings.items()]
            node.keywords = kept + given
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "Policy.from_pretrained":
            node.args = [ast.Constant(self.model)]
        if name.endswith("Trainer"):
            for word in node.keywords:
                if word.arg == "model" and isinstance(word.value, ast.Constant) and "/" in word.value.value:
                    word.value = ast.Constant(self.model)
        return node


def check_shown(shown: list[str], printed: str, where: str) -> None:
    """Each line shown was printed, in that order, white space aside."""
    lines = iter([" ".join(line.split()) for line in printed.splitlines()])
    for line in shown:
        wanted = " ".join(line.split())
        if wanted in ("", "..."):
            continue
        assert any(wanted in line for line in lines), (
            f"{where} shows a line that was not printed: {wanted!r}\n{printed}"
        )


def write_hub_sums(folder: Path) -> None:
    """The same as a dataset in the hub's layout: configuration main with the splits train and test."""
    files = []
    for split in ("train", "test"):
        write_sums(folder / "main" / f"{split}.jsonl")
        files.append({"split": split, "path": f"main/{split}.jsonl"})
    card = yaml.safe_dump({"configs": [{"config_name": "main", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")


def write_sums(path: Path) -> None:
    """Rows in GSM8K's format, with a plain prompt beside the question."""
    rows: list[dict[str, Any]] = []
    for i in range(16):
        question = f"Ann has {i} apples and buys {i + 1}. How many?"
        answer = f"{i}+{i + 1}=<<{2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}"
        rows.append({"prompt": question, "question": question, "answer": answer})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    for path in pages():
        for found in [block for block in read_blocks(path) if block.language in RUN_LANGUAGES]:
            state = f"skipped: {found.skip}" if found.skip else "run"
            print(f"{found.name:<24}{found.language:<9}{state}")
