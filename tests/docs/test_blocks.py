"""Everything that README and docs tell a reader to type works."""

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from blocks import RUN_LANGUAGES, Block, Runner, check_shown, commands, inline_commands, pages, read_blocks

from llm_pg.algorithms.table import ALGORITHMS

PAGES = [page for page in pages() if any(block.language in RUN_LANGUAGES for block in read_blocks(page))]


@pytest.fixture
def runner(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runner]:
    make_model("qwen2", max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "page"), *sys.path])
    known = dict(ALGORITHMS)
    yield Runner(tmp_path / "model")
    for name in set(ALGORITHMS) - set(known):  # what a page registered is its own
        del ALGORITHMS[name]
    for name, module in list(sys.modules.items()):  # the next page may have another mine.py
        if str(tmp_path) in str(getattr(module, "__file__", None)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, runner: Runner) -> None:
    for block in read_blocks(page):
        if block.language in RUN_LANGUAGES:
            try:
                runner.run(block)
            except BaseException as error:
                error.add_note(f"in the block at {block.name}") if hasattr(error, "add_note") else None
                raise


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_command_in_running_text_has_a_form_that_llm_pg_knows(page: Path) -> None:
    from llm_pg.cli import parse

    for command in inline_commands(page):
        words = shlex.split(command)[1:]
        if len(words) == 1 or any(word.startswith("--help") for word in words):
            with pytest.raises(SystemExit, match=r"^0$"):
                parse([words[0], "--help"])
        elif all(word.startswith("-") for word in words[1:]):  # an option is spoken of
            parse([words[0], "my.yaml", *words[1:]])
        else:
            parse(words)


def test_every_block_that_is_not_run_says_why() -> None:
    for page in pages():
        for block in read_blocks(page):
            assert block.skip is None or len(block.skip) > 10, block.name
            assert all(len(reason) > 10 for reason in block.skipped_commands.values()), block.name
            assert block.language in (*RUN_LANGUAGES, "text"), f"{block.name} has no language that is known here"


def test_the_pages_are_few_and_every_link_between_them_leads_somewhere() -> None:
    import re

    assert len(pages()) - 1 <= 20
    for page in pages():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "../../actions/")):  # the latter: GitHub's own pages of the repository
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_a_planted_mistake_is_found(runner: Runner) -> None:
    def block(language: str, text: str) -> Block:
        return Block(Path("planted.md"), 1, language, text)

    with pytest.raises(NameError):
        runner.run(block("python", "not_a_name\n"))
    with pytest.raises(AssertionError):
        runner.run(block("bash", "llm-pg train no_such_file.yaml\n"))
    with pytest.raises(AssertionError, match="not run here"):
        runner.run(block("bash", "make install\n"))
    with pytest.raises(AssertionError, match="was not printed"):
        runner.run(block("console", "$ llm-pg advise --horizon 3 --actions discrete\nno such line\n"))


def test_output_may_be_shortened_and_not_reordered() -> None:
    check_shown(["a", "...", "c"], "a\nb\n  c\n", "here")
    with pytest.raises(AssertionError):
        check_shown(["c", "a"], "a\nb\nc\n", "here")
    block = Block(Path("p.md"), 1, "console", "$ one \\\n  two\nout\n$ three\n")
    assert list(commands(block)) == [("one    two", ["out"]), ("three", [])]
