"""The rows of histories on disk: only new ones are written, and what was written stays."""

import json
import math

import pytest

from jaxnets.training import row_files


class Watched(list):
    """Rows that count how many of them are read."""

    reads = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.reads += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        self.reads += len(self)
        return super().__iter__()


def rows_up_to(count, **more):
    return [{"step": step, "loss": 1 / (step + 0.3), **more} for step in range(count)]


@pytest.mark.parametrize("count", [10, 20_000])
def test_the_number_of_rows_does_not_matter_to_the_next_save(tmp_path, count):
    rows = Watched(rows_up_to(count))
    parts = row_files.extend(tmp_path, rows, [])
    rows.append({"step": count, "loss": math.nan})
    rows.reads = 0
    parts = row_files.extend(tmp_path, rows, parts)
    assert rows.reads == 2  # the last one on disk, which shows whose they are, and the new one
    assert len(json.dumps(parts)) < 300
    read, damaged = row_files.read(tmp_path, parts)
    assert damaged is None and read[:-1] == rows[:-1] and math.isnan(read[-1]["loss"])


def test_rows_after_a_killed_save_go_on_in_a_new_file_and_earlier_checkpoints_stay(tmp_path):
    first = row_files.extend(tmp_path, rows_up_to(3), [])
    lost = [*rows_up_to(3), {"step": 3, "seconds": 0.1}]
    row_files.extend(tmp_path, lost, first)  # no checkpoint has these parts
    second = row_files.extend(tmp_path, rows_up_to(6), first)
    assert [part["file"] for part in second] == ["history_0.jsonl", "history_1.jsonl"]
    third = row_files.extend(tmp_path, rows_up_to(9), second)
    assert len(third) == 2
    for parts, count in ((first, 3), (second, 6), (third, 9)):
        assert row_files.read(tmp_path, parts) == (rows_up_to(count), None)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_files_that_were_cut_or_removed_are_written_anew(tmp_path, damage):
    parts = row_files.extend(tmp_path, rows_up_to(3), [])
    path = tmp_path / "history_0.jsonl"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    parts = row_files.extend(tmp_path, rows_up_to(4), parts)
    assert row_files.read(tmp_path, parts) == (rows_up_to(4), None)


def test_rows_of_another_history_are_not_continued(tmp_path):
    parts = row_files.extend(tmp_path, rows_up_to(3), [])
    for others in (rows_up_to(4, other=1), rows_up_to(2)):
        changed = row_files.extend(tmp_path, others, parts)
        assert row_files.read(tmp_path, changed) == (others, None)
    assert row_files.read(tmp_path, parts) == (rows_up_to(3), None)


def test_the_rows_in_front_of_a_damaged_file_are_read(tmp_path):
    parts = row_files.extend(tmp_path, rows_up_to(3), [])
    path = tmp_path / "history_0.jsonl"
    path.write_text(path.read_text() + "partial")
    parts = row_files.extend(tmp_path, rows_up_to(5), parts)
    damaged = tmp_path / "history_1.jsonl"
    content = bytearray(damaged.read_bytes())
    content[5] ^= 1
    damaged.write_bytes(content)
    assert row_files.read(tmp_path, parts) == (rows_up_to(3), damaged)


def test_without_rows_there_are_no_files(tmp_path):
    assert row_files.extend(tmp_path, [], []) == [] and not list(tmp_path.iterdir())
    assert row_files.read(tmp_path, []) == ([], None)
