"""Patterns of adapters against `re`, which PEFT uses, and where that would take forever."""

import random
import re

import pytest

from jaxnets.pretrained.adapter_patterns import compile_pattern

NAMES = [
    *("model.layers.0.attn.q_proj", "model.layers.11.attn.k_proj", "q_proj", "xq_proj"),
    *("transformer.h.10.attn.c_attn", "a", "b", "aab", "abab", "a.b", "", "layers.0", "\u0661.b"),
]
KEYS = [
    *("q_proj", "attn.q_proj", r"attn\.q_proj", "^model.layers.0.attn.q_proj", "_proj", "c_attn$"),
    *(r"layers\.(0|1)\..*_proj", r"layers\.\d+\.attn\.(q|k)_proj", ".*", ".*attn.*", "(q|k)_proj"),
    *("[ab]+", "[^a]", r"[\d.]+b", "a{2}b", "(ab){2}", "(?:ab){1,3}", "a{,2}b", "a{1,}b", "a*?b"),
    *("(a|ab)(b|ab|)", "(a?|b)*", "((a)|b){2,4}", "(.*a)?b", "", "a||b", "(^a|b)+$", "{a}", "a{b}"),
    *(r"\w+\.b", r"\D\Sb", "]", "(layers\\.)?\\d", "(^|.b).*", "a{0}b", "(a{0,1}){2}b", r"\d\.b"),
]


def expected(key, name):
    return re.match(rf"(.*\.)?({key})$", name) is not None


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_the_names_that_it_matches_in_peft(key):
    matches = compile_pattern(key)
    assert [matches(name) for name in NAMES] == [expected(key, name) for name in NAMES]


def test_random_keys_match_as_in_peft():
    draw, compared = random.Random(0), 0
    parts = [
        "a",
        "b",
        ".",
        r"\.",
        "[ab]",
        "(a|b)",
        "(",
        ")",
        "|",
        "*",
        "+?",
        "?",
        "{1,2}",
        "^",
        "$",
    ]
    for _ in range(3000):
        key = "".join(draw.choices(parts, k=draw.randrange(1, 7)))
        try:
            matches = compile_pattern(key)
        except ValueError:
            continue
        for _ in range(5):
            name = "".join(draw.choices("ab.", k=draw.randrange(7)))
            assert matches(name) == expected(key, name), (key, name)
            compared += 1
    assert compared > 3000


@pytest.mark.parametrize(
    "key", ["(a|a)" * 50 + "b", ".*a" * 100 + "b", "(a?){200}b", "a?" * 200 + "b", "(a|b|ab)*c"]
)
def test_what_takes_re_too_long_does_not_match_soon(key):
    assert not compile_pattern(key)("a" * 200)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("c_(", "a parenthesis is not closed"),
        ("a)(b", "a parenthesis is closed that is not open"),
        ("(a*)*", "it repeats what has repetitions in itself"),
        ("(?:a+|b){2,}", "it repeats what has repetitions in itself"),
        ("a**", r"'\*' in it is not supported"),
        ("a*+", r"'\+' in it is not supported"),
        ("{2}", r"'\{2\}' in it is not supported"),
        ("(?=a)b", r"'\?=a\)b' in it is not supported"),
        ("(?i)A", r"'\?i\)A' in it is not supported"),
        (r"(a)\1", r"'\\\\1' in it is not supported"),
        ("[", r"'\[' in it is not supported"),
        ("[a--b]", r"'\[a--b\]' in it is not supported"),
        ("[b-a]", "bad character range b-a"),
        ("a{3,2}", r"\{3,2\} has no number of repetitions"),
        ("(" * 21 + ")" * 21, "it has more than 20 groups in each other"),
    ],
)
def test_keys_that_are_not_supported_are_refused(key, message):
    with pytest.raises(ValueError, match=message):
        compile_pattern(key)
