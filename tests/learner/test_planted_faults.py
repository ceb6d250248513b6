"""Planted faults on the road from prompt to gradient: each stood in a published trainer, and a named test goes red.

Each killer is a test of this suite, called as it stands: first on the sound code, then with the fault put in. Those of
the estimators and algorithms are in tests/algorithms/test_mutants.py; a temperature that the trainer forgets, and an
end token without credit, in test_real_model_gradient.py.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.model import padding
from llm_pg.model import policy as policy_module
from llm_pg.model.attention import UnsupportedAttention
from llm_pg.model.cache import CachedForward
from llm_pg.model.distribution import SamplingParams
from llm_pg.model.layout import BatchLayout
from llm_pg.model.policy import Policy
from llm_pg.sampling import choice, native
from llm_pg.sampling.native import NativeSampler
from tests.model import test_policy as policies
from tests.sampling import test_samplers as samplers

Patch = pytest.MonkeyPatch
THROUGH_CACHE = functools.partial(NativeSampler, share_prompts=False)


def positions_that_count_the_padding(patch: Patch) -> None:
    original = CachedForward.__call__

    def wrong(self: Any, ids: torch.Tensor, positions: Any, mask: Any, *rest: Any) -> Any:
        columns = positions if mask is None else torch.arange(mask.shape[1])[-ids.shape[1] :].expand_as(ids)
        return original(self, ids, columns, mask, *rest)

    patch.setattr(CachedForward, "__call__", wrong)
    patch.setattr(choice, "objection_to", lambda *_, **__: None)  # the trial before the first step finds it too


def masked(patch: Patch, rule: Callable[[Any, Any], torch.Tensor]) -> None:
    original = NativeSampler.sample

    def wrong(self: NativeSampler, *given: Any) -> Any:
        done = original(self, *given)
        return dataclasses.replace(done, mask_BT=done.mask_BT & rule(self, done))

    patch.setattr(NativeSampler, "sample", wrong)


def end_token_outside_the_mask(patch: Patch) -> None:
    masked(patch, lambda self, done: done.tokens_BT != self.eos_ids[0])


def padding_told_by_its_id(patch: Patch) -> None:
    masked(patch, lambda self, done: done.tokens_BT != self.pad_id)


def dropout_while_sampling(patch: Patch) -> None:
    patch.setattr(native, "eval_mode", lambda model: contextlib.nullcontext())


def reference_that_follows(patch: Patch) -> None:
    class Alias:
        deepcopy = staticmethod(lambda model: _Unfrozen(model))

    patch.setattr(policy_module, "copy", Alias)


class _Unfrozen(torch.nn.Module):
    """The very model in training in the place of a frozen copy."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        object.__setattr__(self, "inner", model)

    def requires_grad_(self, _: bool = True) -> Any:
        return self

    def eval(self) -> Any:
        return self.inner


def adapter_left_on(patch: Patch) -> None:
    from peft import PeftModel

    patch.setattr(PeftModel, "disable_adapter", lambda self: contextlib.nullcontext())


def predicted_one_place_late(patch: Patch) -> None:
    original = padding.padded_rows

    def wrong(rollouts: Any, pad_id: int) -> Any:
        ids, attention, start_B = original(rollouts, pad_id)
        return ids, attention, (start_B + 1).clamp(max=ids.shape[1] - rollouts.mask_BT.shape[1])

    patch.setattr(padding, "padded_rows", wrong)
    patch.setattr(BatchLayout, "shares_prompts", lambda self: False)


def log_probabilities_in_half_precision(patch: Patch) -> None:
    original = Policy.forward

    def wrong(self: Policy, *given: Any, **options: Any) -> Any:
        scores = original(self, *given, **options)
        return dataclasses.replace(scores, logp_BT=scores.logp_BT.bfloat16())

    patch.setattr(Policy, "forward", wrong)


FAULTS: dict[str, tuple[Callable[[Patch], None], Callable[..., None]]] = {
    "position ids count the padding": (
        positions_that_count_the_padding,
        lambda m, t: samplers.test_recorded_logp_is_that_of_one_unpadded_row_alone(
            THROUGH_CACHE, "gpt2", SamplingParams(), m, t
        ),
    ),
    "the end token is left out of the mask": (
        end_token_outside_the_mask,
        lambda m, t: samplers.test_the_end_token_is_inside_the_mask_and_nothing_after_it(NativeSampler, m, t),
    ),
    "pad equal to eos masks the end token": (
        padding_told_by_its_id,
        lambda m, t: samplers.test_pad_equal_to_eos_does_not_mask_the_end_token(m),
    ),
    "dropout stays on while sampling": (
        dropout_while_sampling,
        lambda m, t: samplers.test_dropout_is_off_while_sampling_and_the_mode_comes_back(m, t),
    ),
    "the reference is the model in training": (
        reference_that_follows,
        lambda m, t: policies.test_the_reference_is_frozen_and_does_not_follow_the_policy(m),
    ),
    "the adapter stays on in the reference": (
        adapter_left_on,
        lambda m, t: policies.test_with_an_adapter_the_reference_is_the_policy_as_it_was("as the model without it", m),
    ),
    "each token is scored one place late": (
        predicted_one_place_late,
        lambda m, t: policies.test_logp_and_entropy_equal_those_of_each_row_alone("llama", SamplingParams(), m),
    ),
    "log-probabilities in half precision": (
        log_probabilities_in_half_precision,
        lambda m, t: policies.test_log_probabilities_are_float32_under_bfloat16_weights(m),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_its_test_red(
    fault: str, make_model: Callable[..., Any], tokenizer: Any, monkeypatch: Patch
) -> None:
    plant, killer = FAULTS[fault]
    killer(make_model, tokenizer)
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, UnsupportedAttention)):
        killer(make_model, tokenizer)
