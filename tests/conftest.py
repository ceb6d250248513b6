"""Small models and tokenizers shared by the tests; everything is made here, nothing is fetched."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores, and the models are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {"model_type": "llama", **TINY},
    "qwen2": {"model_type": "qwen2", **TINY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **TINY, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **TINY, "head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 5.0},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from llm_pg.model.loading import character_tokenizer

    return character_tokenizer()


@pytest.fixture
def make_model(tokenizer: Any) -> Callable[..., Any]:
    """A random tiny model of a family, in float32: make_model("qwen2", seed=0)."""

    def make(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
        from llm_pg.config.schema import ModelConfig
        from llm_pg.model.loading import load_model

        return load_model(ModelConfig(make={**FAMILIES[family], **changes}), tokenizer, seed=seed)

    return make


# --- the files that take longest begin first, so that none of them is left alone at the end

LONGEST = (
    "tests/docs/test_notebooks.py",
    "tests/control/test_control_runs.py",
    "tests/docs/test_blocks.py",
    "tests/rewards/test_audit.py",
    "tests/environments/test_number_guessing.py",
    "tests/faults/test_hostile_and_secret.py",
    "tests/prove/test_prove_table.py",
    "tests/device/test_updates.py",
    "tests/from_trl/test_trl_two_ranks.py",
    "tests/distributed/test_collectives.py",
    "tests/model/test_real_model_gradient.py",
)


CI_FILE = Path(__file__).with_name("ci_only.txt")
CI_ONLY = tuple(line for line in CI_FILE.read_text().splitlines() if not line.startswith("#"))


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(rank)))
    for item in items:
        if item.nodeid.startswith(CI_ONLY) and not item.get_closest_marker("slow"):
            item.add_marker("ci")


# --- the tests that are skipped, against the list of those that may be


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--named-skips", metavar="FILE", help="fail where a test is skipped that this file does not name")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--named-skips")
    if file is not None and not hasattr(config, "workerinput"):  # of several processes the first hears of all
        config.pluginmanager.register(NamedSkips(Path(file).read_text()), "named-skips")


class NamedSkips:
    """Ends a session with a failure where a test was skipped that the list does not name.

    Args:
        text: lines of "FILE: REASON"; FILE is the beginning of a test's file, REASON a part of why it is skipped.
    """

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        self.named = [tuple(line.split(": ", 1)) for line in lines]
        self.unnamed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look(report)

    def _look(self, report: Any) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            if not any(report.nodeid.startswith(file) and part in reason for file, part in self.named):
                self.unnamed.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unnamed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.unnamed:
            terminalreporter.section("skipped, and not named in the list of those that may be")
            for line in self.unnamed:
                terminalreporter.write_line(line)
