"""Recordings on disk: round trip, interrupted writing, damage that is named."""

import hashlib
import io
import json
import zipfile

import numpy as np
import pytest

from jaxnets.data import driving

SETTINGS = {"noise": 0.1, "seeds": [0, 20]}


def fake_drive(seed, length):
    random = np.random.default_rng(seed)
    arrays = {
        "frames": random.integers(0, 256, (length, 4, 4, 3), np.uint8),
        "speeds": random.normal(size=length).astype(np.float32),
        "decisions": np.arange(length, dtype=np.int32),
    }
    return driving.Drive(seed, driving.Score(points=10.0 * seed), arrays)


DRIVES = [fake_drive(seed, 3 + seed % 4) for seed in range(20)]


@pytest.fixture
def folder(tmp_path):
    driving.write_recordings(tmp_path / "drives", DRIVES, SETTINGS)
    return tmp_path / "drives"


def test_drives_round_trip_in_order(folder):
    assert driving.has_recordings(folder)
    found = driving.read_recordings(folder, SETTINGS)
    assert set(found) == {"frames", "speeds", "decisions"}
    for name, array in found.items():
        expected = np.concatenate([drive.arrays[name] for drive in DRIVES])
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
    assert len(list(folder.glob("*.npz"))) == 3  # of 8, 8 and 4 drives
    assert driving.read_points(folder) == [10.0 * seed for seed in range(20)]


def test_writing_twice_gives_the_same_bytes(folder, tmp_path):
    driving.write_recordings(tmp_path / "again", DRIVES, SETTINGS)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_interrupted_recordings_count_as_none(tmp_path):
    def interrupted():
        yield from DRIVES[:12]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driving.write_recordings(tmp_path, interrupted(), SETTINGS)
    assert not driving.has_recordings(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no recordings.json.*record first"):
        driving.read_recordings(tmp_path)


def test_a_missing_shard_is_named(folder):
    (folder / "drives_001.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"drives_001.npz is missing; remove .* again"):
        driving.read_recordings(folder)


def test_a_damaged_shard_is_named(folder):
    path = folder / "drives_002.npz"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"drives_002.npz is damaged: sha256 .* expected .*again"):
        driving.read_recordings(folder)


def put_shard(folder, number, content):
    """Replace a shard and its digest."""
    index = json.loads((folder / "recordings.json").read_text())
    index["shards"][number]["sha256"] = hashlib.sha256(content).hexdigest()
    del index["sha256"]
    (folder / "recordings.json").write_text(json.dumps(index))
    (folder / index["shards"][number]["name"]).write_bytes(content)


def npz(**arrays):
    np.savez(stream := io.BytesIO(), **arrays)
    return stream.getvalue()


def one_npz(member, content, flags=0):
    """Return an archive with one member that need not be an array."""
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr(member, content)
    packed = bytearray(stream.getvalue())
    packed[6] |= flags
    packed[packed.index(b"PK\x01\x02") + 8] |= flags
    return bytes(packed)


def npy(header):
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)


DAMAGED = {
    "no archive": b"no archive",
    "an archive without arrays": npz(),
    "no array": one_npz("frames.npy", b"no array"),
    "a cut array": one_npz("frames.npy", npy("{'descr': '<i8', 'fortran_order': False, ")[:40]),
    "a header of another form": one_npz("frames.npy", npy("{'descr': [[[[[[")),
    "a shape beyond memory": one_npz(
        "frames.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1 << 60,)}")
    ),
    "another shape beyond memory": one_npz(
        "frames.npy",
        npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**60}, {2**60})}}"),
    ),
    "an encrypted array": one_npz("frames.npy", npy(""), flags=1),
    "a single value": npz(frames=np.float32(3)),
    "unequal lengths": npz(frames=np.zeros((3, 4, 4, 3), np.uint8), speeds=np.zeros(4)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_shard_that_is_damaged_below_a_fitting_digest_is_named(folder, content):
    put_shard(folder, 1, content)
    message = "drives_001.npz (is not an archive of arrays|has arrays of no common|holds)"
    with pytest.raises(ValueError, match=rf"{message} .*; remove .* again"):
        driving.read_recordings(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"speeds": np.zeros(3)},
        {"speeds": None},
        {"frames": np.zeros((3, 4, 5, 3), np.uint8)},
        {"others": np.zeros(3)},
    ],
)
def test_a_shard_of_other_arrays_than_the_first_is_named(folder, changes):
    arrays = {name: array[:3] for name, array in DRIVES[0].arrays.items()} | changes
    put_shard(folder, 2, npz(**{name: a for name, a in arrays.items() if a is not None}))
    with pytest.raises(ValueError, match=r"drives_002\.npz holds .*, the first one .*; remove"):
        driving.read_recordings(folder)


def test_a_damaged_index_is_named(folder):
    (folder / "recordings.json").write_text("{")
    with pytest.raises(ValueError, match=r"recordings\.json, line 1: .* cut .*; remove"):
        driving.read_recordings(folder)
    (folder / "recordings.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"recordings\.json, line 1: .* no JSON object; remove"):
        driving.read_points(folder)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("points", [[1.0]], r"points\[0\] is \[1\.0\]"),
        ("points", None, "points is null, not a list"),
        ("shards", [], "it has no shard"),
        ("shards", [{"name": "drives_000.npz"}], r"shards\[0\]: it has no 'sha256'"),
        ("shards", [{"name": "../x.npz", "sha256": "0"}], "'../x.npz' is outside the folder"),
        ("settings", [], r"settings is \[\], not an object"),
    ],
)
def test_an_index_with_a_wrong_entry_is_named(name, value, reason, folder):
    path = folder / "recordings.json"
    index = json.loads(path.read_text())
    del index["sha256"]
    path.write_text(json.dumps({**index, name: value}, indent=2))
    for read in (driving.read_recordings, driving.read_points):
        with pytest.raises(ValueError, match=rf"recordings\.json, line \d+: .*{reason}.* again"):
            read(folder)


def test_an_index_that_was_edited_is_refused(folder):
    path = folder / "recordings.json"
    path.write_text(path.read_text().replace("10.0", "90.0"))
    with pytest.raises(ValueError, match="its sha256 is not that of its content"):
        driving.read_points(folder)


def test_other_settings_are_named(folder):
    with pytest.raises(ValueError, match=r"recorded with noise = 0.1, not 0.2; use another"):
        driving.read_recordings(folder, {**SETTINGS, "noise": 0.2})


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no drive to write"):
        driving.write_recordings(tmp_path, [], SETTINGS)


def test_windows_do_not_cross_drives():
    decisions = np.concatenate([drive.arrays["decisions"] for drive in DRIVES])
    found = driving.windows(decisions, 4)
    lengths = [len(drive.arrays["decisions"]) for drive in DRIVES]
    assert len(found) == sum(max(length - 3, 0) for length in lengths)
    assert (np.diff(decisions[found], axis=1) == 1).all()
    assert driving.windows(decisions, 1).ravel().tolist() == list(range(len(decisions)))


@pytest.mark.parametrize(("length", "message"), [(0, "1 or more"), (7, "no drive has 7")])
def test_impossible_windows_are_named(length, message):
    with pytest.raises(ValueError, match=message):
        driving.windows(np.concatenate([np.arange(6), np.arange(6)]), length)
