"""JSON files: round trips, digests, and faults that are named with file and line."""

import json
from typing import Any, NotRequired, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets.storage import read_json, read_json_lines, write_json

WORDS = {"what": "the shopping of a week", "remedy": "go again"}


class Item(TypedDict):
    name: str
    price: float


class Shopping(TypedDict):
    shop: str
    count: int
    open: NotRequired[bool]
    items: list[Item]
    discounts: NotRequired[dict[str, float | None]]
    more: NotRequired[Any]


GOOD = {"shop": "corner", "count": 2, "items": [{"name": "tea", "price": 3}], "open": True}


def read(path):
    return read_json(path, **WORDS).check(Shopping)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None)  # the disk may be busy
@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), VALUES))
def test_every_content_is_read_as_it_was_written(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, content)
    found = read_json(path, **WORDS).content
    assert json.dumps(found) == json.dumps(content)  # as text, in which NaN equals NaN


def test_the_layout_of_a_file_may_change_and_its_content_may_not(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, GOOD)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, sort_keys=True))
    assert read(path) == GOOD
    for changed in ({**content, "count": 3}, {**content, "extra": None}, {**content, "open": 1}):
        path.write_text(json.dumps(changed, indent=1))
        with pytest.raises(ValueError, match=r"a\.json, line \d+: not the shopping of a week: "):
            read(path)


def test_brackets_within_text_are_not_nested(tmp_path):
    write_json(tmp_path / "a.json", {**GOOD, "shop": '[\\"' * 300})
    assert read(tmp_path / "a.json")["shop"] == '[\\"' * 300


def test_a_file_without_a_digest_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read(tmp_path / "a.json") == GOOD


def test_a_missing_file_is_one_sentence_with_the_folder_and_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    for folder, reason in ((tmp_path, "No such file"), (tmp_path / "file", "Not a directory")):
        message = rf"{folder.name} has no a\.json \({reason}.*\); go shopping"
        with pytest.raises(FileNotFoundError, match=message):
            read_json(folder / "a.json", **WORDS, if_missing="go shopping")
    with pytest.raises(FileNotFoundError, match=r"Errno 2.*a\.json"):
        read_json(tmp_path / "a.json", **WORDS)


def test_a_digest_of_the_user_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has an entry 'sha256'; rename it"):
        write_json(tmp_path / "a.json", {"sha256": "0"})


TEXT = """{
  "shop": "corner",
  "count": 2,
  "items": [
    {"name": "tea",
     "price": 3}
  ],
  "open": true
}"""


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        (TEXT, "", 1, "cut or no JSON"),
        ('"open": true\n}', '"op', 8, "cut or no JSON"),
        (TEXT, "[1]", 1, "no JSON object"),
        (TEXT, "null", 1, "no JSON object"),
        ('"shop": "corner",', "", 1, "it has no 'shop'"),
        ('"corner"', "7", 2, "shop is 7, not text"),
        ("2,", "2.0,", 3, r"count is 2\.0, not an integer"),
        ("2,", "true,", 3, "count is true, not an integer"),
        ("2,", "null,", 3, "count is null, not an integer"),
        ("2,", "9" * 5000 + ",", 3, "Exceeds the limit"),
        ("3}", '"3"}', 4, r"items\[0\]: price is \"3\", not a finite number"),
        ("3}", "NaN}", 4, r"items\[0\]: price is NaN, not a finite number"),
        ("3}", "1e999}", 4, r"items\[0\]: price is Infinity, not a finite number"),
        ("3}", "9" * 400 + "}", 4, r"items\[0\]: price is 9* \.\.\., not a finite number"),
        ('"name": "tea",', "", 4, r"items\[0\]: it has no 'name'"),
        ('{"name": "tea",\n     "price": 3}', "4", 4, r"items\[0\] is 4, not an object"),
        ('"open"', '"count"', 8, "'count' occurs twice"),
        ('"price"', '"name"', 4, "'name' occurs twice"),
        ("true", "[" * 100_000 + "]" * 100_000, 8, "nested too deeply"),
        ("true", "[" * 200 + "]" * 200, 1, "nested too deeply"),
        ("true", '1, "discounts": {"a": "b"}', 8, "open is 1, not true or false"),
        ("true", 'true,\n "discounts": {"a": []}', 9, r"discounts\['a'\] is \[\], not a finite"),
        ("corner", "c\udc80", 2, "not text in UTF-8"),
        ("corner", "c\tr", 2, "cut or no JSON"),
        ("corner", "\\uD800 corner", 2, "half a surrogate pair"),
    ],
)
def test_a_fault_is_named_with_file_line_and_remedy(old, new, line, reason, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(TEXT.replace(old, new).encode("utf-8", "surrogateescape"))
    message = rf"bad\.json, line {line}: not the shopping of a week: .*{reason}.*; go again$"
    with pytest.raises(ValueError, match=message):
        read(path)


@settings(deadline=None)  # the disk may be busy
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_damage_is_noticed_or_harmless(tmp_path_factory, position, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    write_json(path, GOOD)
    whole = path.read_bytes()
    position %= len(whole)
    path.write_bytes(whole[:position] + damage + whole[position + len(damage) :])
    try:  # white space, an escape of the same character, or the name of the digest
        found = read(path)
        assert {name: found[name] for name in GOOD} == GOOD
    except ValueError as error:
        assert f"{path}, line " in str(error)


def test_an_entry_that_a_closed_type_does_not_have_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**GOOD, "colour": 1}, indent=0))
    with pytest.raises(ValueError, match=r"line 11: .*'colour' is not an entry of it"):
        read_json(tmp_path / "a.json", **WORDS).check(Shopping, closed=True)


class Row(TypedDict):
    step: int


def test_lines_are_read_and_faults_have_their_number(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": null}\n{"step": 2}\n')
    rows = [row.check(Row) for row in read_json_lines(path, **WORDS)]
    assert rows == [{"step": 1, "loss": None}, {"step": 2}]
    with pytest.raises(ValueError, match=r"jsonl, line 1: .*loss is null, not a finite number"):
        read_json_lines(path, **WORDS)[0].check(dict[str, float])
    for bad in (b'{"ste', b"\xff", b'{"step": 1.5}', b"[]", b'{"step": 1, "step": 1}'):
        path.write_bytes(b'{"step": 1}\n\n' + bad)
        with pytest.raises(ValueError, match=r"log\.jsonl, line 3: not the shopping"):
            read_json_lines(path, **WORDS)[-1].check(Row)


def test_a_missing_file_is_a_missing_file(tmp_path):
    for reader in (read_json, read_json_lines):
        with pytest.raises(FileNotFoundError):
            reader(tmp_path / "none", **WORDS)
