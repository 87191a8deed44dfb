"""Text datasets: the published ones where present, small ones in their layout, bad lines."""

import collections
import dataclasses
import gzip
import hashlib

import numpy as np
import pytest

from jaxnets.data import multi30k, python_topics, sst2, tiny_shakespeare
from jaxnets.data.datasets import text
from jaxnets.data.datasets.text import decode_labeled, decode_pairs
from jaxnets.data.files import find


@pytest.fixture
def empty_places(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXNETS_DATA", raising=False)
    monkeypatch.setattr("jaxnets.data.files.SYSTEM_FOLDERS", ())


def needs(file):
    """Skip unless a file is on this machine."""
    return pytest.mark.skipif(
        find([file]) is None, reason=f"{file.name} is not here; set JAXNETS_DATA to its folder"
    )


def write(folder, files, contents):
    """Write small files under the names of a dataset; return them with matching digests."""
    folder.mkdir(parents=True, exist_ok=True)
    pinned = []
    for file, content in zip(files, contents, strict=True):
        stored = gzip.compress(content) if file.name.endswith(".gz") else content
        (folder / file.name).write_bytes(stored)
        pinned.append(dataclasses.replace(file, sha256=hashlib.sha256(content).hexdigest()))
    return tuple(pinned)


# Files in the layout of the published ones


def test_a_text_is_split_at_nine_tenths_of_its_characters(tmp_path, monkeypatch, empty_places):
    content = "äbcdefghijklmnopqrs".encode()
    files = write(tmp_path / "tinyshakespeare", [text.TINY_SHAKESPEARE_FILE], [content])
    monkeypatch.setattr(text, "TINY_SHAKESPEARE_FILE", files[0])
    dataset = tiny_shakespeare(tmp_path, download=False)
    assert (dataset.train, dataset.validation) == ("äbcdefghijklmnopq", "rs")


@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("de", "en")])
def test_sentences_are_paired_in_the_requested_direction(
    tmp_path, monkeypatch, empty_places, source, target
):
    contents = [f"{file.name} 1 \n{file.name} 2\n".encode() for file in text.MULTI30K_FILES]
    files = write(tmp_path / "multi30k", text.MULTI30K_FILES, contents)
    monkeypatch.setattr(text, "MULTI30K_FILES", files)
    dataset = multi30k(tmp_path, source_language=source, target_language=target, download=False)
    assert (dataset.source_language, dataset.target_language) == (source, target)
    for pairs, part in (
        (dataset.train, "train"),
        (dataset.validation, "val"),
        (dataset.test, "test_2016_flickr"),
    ):
        assert pairs == tuple(
            (f"{part}.{source}.gz {end}", f"{part}.{target}.gz {end}") for end in ("1 ", "2")
        )


def test_labeled_sentences_keep_their_order(tmp_path, monkeypatch, empty_places):
    contents = [f"{file.name} is bad\t0\nit 's good\t1".encode() for file in text.SST2_FILES]
    monkeypatch.setattr(text, "SST2_FILES", write(tmp_path / "sst2", text.SST2_FILES, contents))
    dataset = sst2(tmp_path, download=False)
    assert dataset.validation.texts == ("dev.tsv is bad", "it 's good")
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.test.labels.dtype == np.int32
    assert (dataset.num_classes, len(dataset.train)) == (2, 2)


@pytest.mark.parametrize(
    ("load", "files"),
    [
        (tiny_shakespeare, (text.TINY_SHAKESPEARE_FILE,)),
        (multi30k, text.MULTI30K_FILES),
        (sst2, text.SST2_FILES),
    ],
)
def test_a_missing_or_changed_file_is_an_error_with_the_address(
    tmp_path, empty_places, load, files
):
    with pytest.raises(FileNotFoundError, match=r"download https://raw\.githubusercontent"):
        load(download=False)
    write(tmp_path / files[0].folders[0], files, [b"another text\t1\n"] * len(files))
    with pytest.raises(ValueError, match=r"is not the published file.*download https"):
        load(tmp_path, download=False)


def test_pinned_files_have_whole_digests_and_addresses_of_one_commit():
    files = (text.TINY_SHAKESPEARE_FILE, *text.MULTI30K_FILES, *text.SST2_FILES)
    assert len({file.sha256 for file in files}) == len(files) == 10
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32
        assert file.url.endswith(f"/{file.name}")
        commit = file.url.split("/")[5]
        assert len(bytes.fromhex(commit)) == 20


def test_other_languages_are_refused():
    with pytest.raises(ValueError, match=r"\('en', 'fr'\) are not those of the files"):
        multi30k(target_language="fr", download=False)


# The published files


@needs(text.TINY_SHAKESPEARE_FILE)
def test_tiny_shakespeare_is_the_published_one():
    dataset = tiny_shakespeare(download=False)
    assert (len(dataset.train), len(dataset.validation)) == (1_003_854, 111_540)
    assert len(set(dataset.train + dataset.validation)) == 65
    assert dataset.train.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")


@needs(text.MULTI30K_FILES[0])
def test_multi30k_is_the_published_one():
    dataset = multi30k(download=False)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [
        *(29_000, 1_014, 1_000)
    ]
    assert dataset.test[0] == (
        "A man in an orange hat starring at something.",
        "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.",
    )
    reverse = multi30k(source_language="de", target_language="en", download=False)
    assert reverse.validation == tuple((b, a) for a, b in dataset.validation)


@needs(text.SST2_FILES[0])
def test_sst2_is_the_published_one_with_its_repetitions():
    dataset = sst2(download=False)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [np.bincount(part.labels).tolist() for part in parts] == [
        *([3310, 3610], [428, 444], [912, 909])
    ]
    pairs = [set(zip(part.texts, part.labels.tolist(), strict=True)) for part in parts]
    assert pairs[0] & pairs[2] == {("no", 0), ("what 's next ?", 1)}
    assert len(set(dataset.train.texts) & set(dataset.test.texts)) == 2
    assert not set(dataset.train.texts) & set(dataset.validation.texts)
    assert sum(count - 1 for count in collections.Counter(dataset.train.texts).values()) == 9


def test_pythons_topics_are_always_available(empty_places):
    dataset = python_topics()
    text = dataset.train + dataset.validation
    assert len(dataset.train) == len(text) * 9 // 10
    assert len(text) > 300_000
    assert "A function definition is an executable statement" in text


# Bad lines


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (b"a\nb\n", b"c\n", "en.txt has 2 lines and de.txt has 1"),
        (b"a\n\nb\n", b"c\nd\ne\n", r"line 2 of en\.txt is empty"),
        (b"a\n", b" \n", r"line 1 of de\.txt is empty"),
        (b"", b"", r"line 1 of en\.txt is empty"),
        (b"a\xff\n", b"c\n", r"en\.txt is not UTF-8"),
    ],
)
def test_non_parallel_texts_are_refused(source, target, message):
    with pytest.raises(ValueError, match=message):
        decode_pairs(source, target, names=("en.txt", "de.txt"))


def test_only_line_ends_divide_sentences():
    source = "a\u2028b\x0cc\r\nd".encode()  # line separator and form feed stay within
    assert decode_pairs(source, b"1\n2\n") == (("a\u2028b\x0cc", "1"), ("d", "2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\t1\nbad 0\n", r"line 2 of x\.tsv is 'bad 0'; make it a sentence, a tab"),
        (b"good\t1\t1\n", r"line 1 of x\.tsv is 'good\\t1\\t1'"),
        (b"\t1\n", r"line 1 of x\.tsv is '\\t1'"),
        (b"good\t2\n", r"label '2'; give an integer in \[0, 2\)"),
        (b"good\t-1\n", "label '-1'"),
        (b"good\t1.0\n", "label '1.0'"),
        (b"good\t\n", "label ''"),
        (b"good\t1\n\n", r"line 2 of x\.tsv is empty"),
        (b"g\xc3(\t1\n", r"x\.tsv is not UTF-8"),
    ],
)
def test_invalid_lines_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        decode_labeled(content, num_classes=2, name="x.tsv")
