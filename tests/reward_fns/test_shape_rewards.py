"""Rewards that look at the form: tags, patterns, JSON, length, repetition."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from reward_fns.format import format_regex, format_tags
from reward_fns.json_schema import json_schema
from reward_fns.penalties import length_penalty, repetition_penalty


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>a\n</think>\n\n<answer>b</answer> ", 1.0),
        ("<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("so <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> so", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think><answer>a</think>b</answer>", 0.0),
        ("<think>a<answer>b</answer>", 0.0),
        ("</think><think>a<answer>b</answer>", 0.0),
    ],
)
def test_each_tag_stands_once_in_order_with_text_inside(completion, reward):
    assert format_tags(completion) == reward


def test_tags_are_the_users_choice():
    assert format_tags("<a>1</a>", tags=["a"]) == 1.0
    for tags in ([], "think"):
        with pytest.raises(ValueError, match="list of tag names"):
            format_tags("x", tags=tags)


def test_a_pattern_matches_the_whole_completion_or_any_part():
    assert format_regex("a1\nb2", pattern=r".*\d") == 1.0
    assert format_regex("a1 b", pattern=r".*\d") == 0.0
    assert format_regex("a1 b", pattern=r"\d", whole=False) == 1.0
    with pytest.raises(ValueError, match="cannot compile"):
        format_regex("x", pattern="(")


@pytest.mark.faults
def test_a_pattern_that_backtracks_without_end_is_given_up():
    start = time.monotonic()
    assert format_regex("a" * 5_000 + "c", pattern=r"(a|aa)+b") == 0.0
    assert format_regex("a" * 5_000 + "!", pattern=r"((a+)+)+$(?<=b)") == 0.0
    assert time.monotonic() - start < 5.0


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}


@pytest.mark.parametrize(
    "completion, reward",
    [
        ('{"n": 3}', 1.0),
        (' {"n": 3, "more": []}\n', 1.0),
        ('```json\n{"n": 3}\n```', 1.0),
        ('```\n{"n": 3}\n```', 1.0),
        ('```JSON\n{"n": 3}\n```', 1.0),
        ('```Json {"n": 3} ```', 1.0),
        ('<think>{"n": -3}?</think>\n{"n": 3}', 1.0),
        ('{"n": 3, "m": "' + "[" * 101 + '"}', 1.0),
        ('{"n": 3, "m": "\\\\\\"' + "[" * 101 + '"}', 1.0),
        ('```python\n{"n": 3}\n```', 0.0),
        ('{"n": -3}', 0.0),
        ('{"n": "3"}', 0.0),
        ('{"n": NaN}', 0.0),
        ("{}", 0.0),
        ('Here: {"n": 3}', 0.0),
        ('{"n": 3} {"n": 3}', 0.0),
        ('{"n": ' + "9" * 5_000 + "}", 0.0),
        ('{"n": 3, "m": ' + "[" * 101 + "]" * 101 + "}", 0.0),
        ("```", 0.0),
        ("", 0.0),
    ],
)
def test_the_completion_is_one_json_value_of_the_schema(completion, reward):
    pytest.importorskip("jsonschema")
    assert json_schema(completion, schema=SCHEMA) == reward
    assert json_schema(completion, schema=json.dumps(SCHEMA)) == reward


@pytest.mark.faults
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a|aa)+$"},
        {"type": "object", "patternProperties": {"^(a|aa)+$": {"type": "integer"}}},
        {"type": "object", "patternProperties": {"^(a|aa)+$": {}}, "additionalProperties": False},
        {"type": "array", "items": {"pattern": "^(a|aa)+$"}},
    ],
)
def test_a_schemas_pattern_that_backtracks_without_end_is_given_up(schema):
    pytest.importorskip("jsonschema")
    text = "a" * 5_000 + "!"
    value = {"string": text, "object": {text: 1, text + "!": 2}, "array": [text] * 50}[schema["type"]]
    start = time.monotonic()
    assert json_schema(json.dumps(value), schema=schema) == 0.0
    assert time.monotonic() - start < 3.0


@pytest.mark.parametrize(
    "value, fits",
    [
        ({"a1": 3}, True),
        ({"a1": "3"}, False),
        ({"b": 3}, False),
        ({"name": "Ann"}, True),
        ({"name": "ann"}, False),
        ({"name": "Ann", "a2": 1, "a3": 2}, True),
    ],
)
def test_bounded_patterns_decide_as_jsonschemas_own_do(value, fits):
    jsonschema = pytest.importorskip("jsonschema")
    schema = {
        "properties": {"name": {"pattern": "^[A-Z]"}},
        "patternProperties": {"^a[0-9]$": {"type": "integer"}},
        "additionalProperties": False,
    }
    assert jsonschema.Draft202012Validator(schema).is_valid(value) == fits
    assert json_schema(json.dumps(value), schema=schema) == float(fits)


def test_a_schema_whose_patterns_cannot_be_bounded_or_compiled_is_refused():
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="cannot be bounded in time"):
        json_schema("{}", schema={"patternProperties": {"a": {}}, "unevaluatedProperties": False})
    with pytest.raises(ValueError, match="is not a 'regex'"):
        json_schema('"a"', schema={"pattern": "("})


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, "{", 3])
def test_a_schema_that_is_none_is_refused(schema):
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="needs a JSON Schema"):
        json_schema("{}", schema=schema)


def test_a_reference_to_another_document_is_not_fetched():
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="none is fetched"):
        json_schema("{}", schema={"$ref": "http://127.0.0.1:9/schema.json"})


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(1, 200), st.integers(0, 200))
def test_the_length_penalty_is_trls_soft_overlong_punishment(length, max_length, cushion):
    cushion = min(cushion, max_length)
    ids = [0] * length
    theirs = get_soft_overlong_punishment(max_length, cushion)(completion_ids=[ids])
    assert length_penalty("", ids, max_length=max_length, cushion=cushion) == pytest.approx(theirs[0])


@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"max_length": 5, "cushion": 6}, {"max_length": 5, "cushion": -1}]
)
def test_a_penalty_without_a_range_is_refused(options):
    with pytest.raises(ValueError, match="cushion <= max_length"):
        length_penalty("", [1], **options)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4))
def test_the_repetition_penalty_of_words_is_trls_of_tokens(ids, ngram):
    theirs = get_repetition_penalty_reward(ngram, max_penalty=-1.0)([ids])
    assert repetition_penalty(" ".join(map(str, ids)), ngram=ngram) == pytest.approx(theirs[0])


def test_repetition_by_characters():
    assert repetition_penalty("aaaa", ngram=1, unit="character") == -0.75
    assert repetition_penalty("abcd", ngram=1, unit="character") == 0.0


@pytest.mark.parametrize("options", [{"ngram": 0}, {"unit": "token"}])
def test_units_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="ngram >= 1 and unit"):
        repetition_penalty("a", **options)
