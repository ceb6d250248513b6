"""The names at the top of the package, as an editor and a type checker see them."""

import inspect
import subprocess
import sys
from pathlib import Path

import flat_stub
import pytest

import llm_pg

SCRIPT = """
from llm_pg import Algorithm, GRPOConfig, GRPOTrainer, Learner, Policy, Prompts, Sampler, Scorer

reveal_type(GRPOTrainer(args=GRPOConfig("out", learning_rate=1e-6)).policy)
GRPOConfig("out", learning_rat=1e-6)
reveal_type(Sampler(Policy.from_pretrained("m")).sample([], 4).texts)
reveal_type(Learner.update)
Policy.from_pretrained("m", temprature=1.0)
"""


def test_dir_and_help_show_the_public_names() -> None:
    assert {"GRPOTrainer", "GRPOConfig", "Policy", "Prompts", "Sampler", "Scorer", "Algorithm", "Learner"} <= set(
        dir(llm_pg)
    )
    assert all(getattr(llm_pg, name).__doc__ for name in llm_pg.__all__ if name != "__version__")


@pytest.mark.slow
def test_a_type_checker_knows_them_in_a_users_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    ).stdout
    assert 'Revealed type is "llm_pg.model.policy.Policy"' in found, found
    assert "list[str]" in found or "builtins.list[builtins.str]" in found
    assert "llm_pg.learner.learner.Update" in found
    assert 'Unexpected keyword argument "temprature"' in found
    assert 'Unexpected keyword argument "learning_rat" for "GRPOConfig"; did you mean "learning_rate"?' in found, found
    assert found.count("error:") == 2, found


def test_a_config_shows_its_settings_to_help_and_completion() -> None:
    config = llm_pg.GRPOConfig("out", learning_rate=2e-6)
    assert {"learning_rate", "num_generations", "per_device_train_batch_size"} <= set(dir(config))
    assert "learning_rate" in inspect.signature(llm_pg.GRPOConfig).parameters


def test_the_stub_of_the_flat_configs_is_made_of_the_tables() -> None:
    made = (Path(llm_pg.__file__).parent / "config" / "flat.pyi").read_text()
    assert made == flat_stub.stub(), "python docs/generators/flat_stub.py llm_pg/config/flat.pyi"
