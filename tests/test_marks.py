"""A test that agrees with a stand-in of ours says so."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent
STAND_INS = ("FakeVllm", "FakeCuda", "FakeAccelerator", "ThreadingHTTPServer")


def unmarked(source: str) -> bool:
    """Whether a file of tests uses a stand-in and no mark `fake` is in it."""
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool(names & set(STAND_INS)) and "fake" not in names


def test_every_file_that_uses_a_stand_in_marks_the_tests_that_do() -> None:
    files = [path for path in TESTS.rglob("test_*.py") if unmarked(path.read_text())]
    assert [path.name for path in files] == []


def test_a_file_without_the_mark_is_found() -> None:
    assert unmarked("server = FakeVllm(1)")
    assert not unmarked("@pytest.mark.fake\ndef test(): FakeVllm(1)")
