"""Supervised steps before a run, by trl's trainer."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.config.load import check_values
from llm_pg.run.before.warm_start import warm_start


@pytest.mark.parametrize("lora", [False, True])
def test_copies_of_a_model_that_was_warmed_up_compute_with_their_own_weights(
    lora: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """trl leaves a forward that calls the model it was made for: as a reference such a copy would follow the policy."""
    model = make_model()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(8)))
    config = check_values({"warm_start_steps": 2, "warm_start_data_files": str(rows), "use_cpu": True})
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    warm_start(model, tokenizer, config, set())
    model.eval()
    after = model(input_ids=ids).logits
    assert not torch.equal(before, after)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(input_ids=ids).logits.any()
    assert torch.equal(model(input_ids=ids).logits, after)
    assert not any("forward" in vars(module) for module in model.modules())
