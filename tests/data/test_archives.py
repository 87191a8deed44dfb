"""Archives: members that stay in their folder, damage that is named, bounds on sizes."""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from jaxnets.data import safe_extract
from jaxnets.data.archives import open_archive

CONTENT = b"the published content" * 50


def files_below(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def tar_member(name, **attributes):
    member = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    return member


def make_tar(path, *members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for member in members:
            content = CONTENT if member.isreg() else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_zip(path, *names, mode=0o644):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"" if name.endswith("/") else CONTENT)
    return path


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_plain_archive_is_extracted_with_its_folders(tmp_path, kind):
    if kind == "tar":
        folder = tar_member("a", type=tarfile.DIRTYPE)
        members = (folder, tar_member("./a/one"), tar_member("b/c/two"))
        archive = make_tar(tmp_path / "x.tar.gz", *members)
    else:
        archive = make_zip(tmp_path / "x.zip", "a/", "a/one", "b/c/two")
    target = safe_extract(archive, tmp_path / "new" / "folder")
    assert {str(path.relative_to(target)) for path in files_below(target)} == {"a/one", "b/c/two"}
    assert (target / "a/one").read_bytes() == CONTENT


EVIL_NAMES = ["/abs", "../up", "a/../../up", "C:\\abs", "C:abs", "\\abs", "a\\..\\..\\up"]
EVIL_MEMBERS = [
    *(tar_member(name) for name in EVIL_NAMES),
    tar_member("link", type=tarfile.SYMTYPE, linkname="/etc"),
    tar_member("link", type=tarfile.SYMTYPE, linkname=".."),
    tar_member("link", type=tarfile.LNKTYPE, linkname="../../secret"),
    tar_member("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    tar_member("disk", type=tarfile.BLKTYPE),
    tar_member("pipe", type=tarfile.FIFOTYPE),
]


@pytest.mark.parametrize("member", EVIL_MEMBERS, ids=lambda m: f"{m.name} {m.linkname}")
def test_a_tar_archive_with_paths_outside_is_refused_before_anything_is_written(tmp_path, member):
    archive = make_tar(tmp_path / "evil.tar.gz", tar_member("harmless"), member)
    with pytest.raises(ValueError, match="not safe to extract: member"):
        safe_extract(archive, tmp_path / "inside" / "folder")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_a_zip_archive_with_paths_outside_is_refused(tmp_path, name):
    archive = make_zip(tmp_path / "evil.zip", "harmless", name)
    with pytest.raises(ValueError, match="not safe to extract: member"):
        safe_extract(archive, tmp_path / "folder")
    assert files_below(tmp_path) == [archive]


def test_a_link_in_a_zip_archive_is_refused(tmp_path):
    archive = make_zip(tmp_path / "evil.zip", "link", mode=stat.S_IFLNK | 0o777)
    with pytest.raises(ValueError, match="a link or device"):
        safe_extract(archive, tmp_path / "folder")


def test_an_invalid_archive_is_refused_and_leaves_nothing(tmp_path):
    whole = make_tar(tmp_path / "x.tar.gz", tar_member("a"), tar_member("b")).read_bytes()
    zipped = make_zip(tmp_path / "x.zip", "a").read_bytes()
    flipped = zipped.replace(CONTENT[:20], CONTENT[:19] + b"!")
    for number, content in enumerate((whole[:-30], whole[:20], b"", CONTENT, flipped)):
        archive = tmp_path / f"bad{number}"
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad{number} is damaged or not"):
            safe_extract(archive, tmp_path / "inside" / "folder")
    assert not list(tmp_path.glob("inside/*"))


def test_an_existing_folder_is_not_extracted_over(tmp_path):
    archive = make_tar(tmp_path / "x.tar.gz", tar_member("a"))
    safe_extract(archive, tmp_path / "folder")
    with pytest.raises(FileExistsError, match="folder exists already"):
        safe_extract(archive, tmp_path / "folder")


def extract_refused(archive, message, **options):
    """Check that an archive is refused, by its name, and that nothing is left."""
    before = sorted(archive.parent.rglob("*"))
    with pytest.raises(ValueError, match=f"(?s){archive.name} .*{message}"):
        safe_extract(archive, archive.parent / "folder", **options)
    assert sorted(archive.parent.rglob("*")) == before


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_archive_is_extracted_with_every_compression(tmp_path, mode):
    archive = make_tar(tmp_path / "x", tar_member("a/one"), tar_member("two"), mode=mode)
    safe_extract(archive, tmp_path / "folder")
    assert (tmp_path / "folder" / "a" / "one").read_bytes() == CONTENT


def test_a_tar_archive_that_ends_with_a_zip_archive_is_a_tar_archive(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", "inside").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tar_member("inner.zip", size=len(inner))
        archive.addfile(info, io.BytesIO(inner))
    safe_extract(tmp_path / "x.tar", tmp_path / "folder")
    assert (tmp_path / "folder" / "inner.zip").read_bytes() == inner


def test_a_tar_archive_whose_first_name_starts_like_a_compressed_file_is_extracted(tmp_path):
    make_tar(tmp_path / "x.tar", tar_member("BZh91AY"), mode="w")
    safe_extract(tmp_path / "x.tar", tmp_path / "folder")
    assert (tmp_path / "folder" / "BZh91AY").read_bytes() == CONTENT


# Members that cannot be files of their own

CONFLICTS = [
    (("a", "a"), "'a' is there twice"),
    (("a", "b", "./a"), "'./a' is there twice"),
    (("a", "a/"), "is there twice"),
    (("b/a", "b"), "'b' is there twice"),
    (("b//a", "b/./a"), "is there twice"),
    (("a", "a/b"), "'a/b' is below 'a', which is a file"),
    (("a", "a/b/c/d"), "is below 'a', which is a file"),
    (("a/b/c/d", "a/b"), "'a/b' is there twice"),
    (("x" * 5000,), "is a name that no file can have"),
    (("./",), "holds no file"),
]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize(("names", "message"), CONFLICTS, ids=lambda v: str(v)[:40])
def test_members_that_are_in_the_way_of_each_other_are_refused(tmp_path, kind, names, message):
    if kind == "tar":
        kinds = {True: tarfile.DIRTYPE, False: tarfile.REGTYPE}
        members = [tar_member(name, type=kinds[name.endswith("/")]) for name in names]
        archive = make_tar(tmp_path / "x.tar", *members)
    else:
        archive = make_zip(tmp_path / "x.zip", *names)
    extract_refused(archive, message)


def test_a_file_without_a_name_is_refused(tmp_path):
    extract_refused(make_tar(tmp_path / "x.tar", tar_member(".")), "a name that no file can have")
    extract_refused(make_tar(tmp_path / "y.tar", tar_member("")), "a name that no file can have")


def test_a_sparse_file_is_refused(tmp_path):
    member = tar_member("a", type=tarfile.GNUTYPE_SPARSE)
    extract_refused(make_tar(tmp_path / "x.tar", member), "a sparse file")


def patch_zip(path, *, flags=None, method=None):
    """Change the flags or the method of the only member, in both of its headers."""
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    for start in (6, central + 8):
        if flags is not None:
            content[start : start + 2] = flags.to_bytes(2, "little")
        if method is not None:
            content[start + 2 : start + 4] = method.to_bytes(2, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": 0x1}, "'a' is encrypted"),
        ({"flags": 0x41}, "'a' is encrypted"),
        ({"flags": 0x20}, "'a' is compressed by method 0, which"),
        ({"method": 9}, "'a' is compressed by method 9, which is not read"),  # Deflate64
        ({"method": 99}, "'a' is compressed by method 99, which is not read"),
    ],
)
def test_an_encrypted_or_unknown_member_is_refused(tmp_path, changes, message):
    extract_refused(patch_zip(make_zip(tmp_path / "x.zip", "a"), **changes), message)


# Damage


@pytest.mark.parametrize("end", [512, 512 + 1050, 512 + 1536, 512 + 1536 + 100, 2 * 2048])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_archive_that_is_cut_anywhere_is_refused(tmp_path, end, compress):
    whole = make_tar(tmp_path / "x", tar_member("a"), tar_member("b"), mode="w").read_bytes()
    (tmp_path / "x").write_bytes(compress(whole[:end]))
    extract_refused(tmp_path / "x", "is damaged or not a tar or zip archive")
    (tmp_path / "x").write_bytes(compress(whole[: 2 * 2048 + 512]))  # the end mark is there
    safe_extract(tmp_path / "x", tmp_path / "folder")


def test_a_damaged_header_of_a_later_member_is_refused(tmp_path):
    content = bytearray(
        make_tar(tmp_path / "x", tar_member("a"), tar_member("b"), mode="w").read_bytes()
    )
    content[2048 + 3] ^= 1
    (tmp_path / "x").write_bytes(content)
    extract_refused(tmp_path / "x", "no end mark: .* a header is damaged")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_archive_without_its_checksum_is_refused(tmp_path, compress):
    whole = make_tar(tmp_path / "x", tar_member("a"), mode="w").read_bytes()
    (tmp_path / "x").write_bytes(compress(whole)[:-4])
    extract_refused(tmp_path / "x", "is damaged")


def test_a_member_that_is_shorter_than_its_header_says_is_refused(tmp_path):
    content = bytearray(make_zip(tmp_path / "x.zip", "a").read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 24 : central + 28] = (2000).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(content)
    extract_refused(tmp_path / "x.zip", "is damaged")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_chain_of_extended_headers_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2000):
            archive.addfile(tar_member("a", type=kind, size=0))
    extract_refused(tmp_path / "x.tar", "is damaged")


# Bounds


def test_an_archive_beyond_the_bound_is_refused_before_anything_is_written(tmp_path):
    tar = make_tar(tmp_path / "x.tar.gz", tar_member("a"), tar_member("b"))
    zipped = make_zip(tmp_path / "x.zip", "a", "b")
    for archive in (tar, zipped):
        extract_refused(archive, "unpacks to more than 9000 bytes; .* larger", max_bytes=9000)
    safe_extract(tar, tmp_path / "folder", max_bytes=11_000)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_small_archive_of_large_content_is_not_unpacked(tmp_path, mode):
    with tarfile.open(tmp_path / "x", mode) as archive:
        archive.addfile(tar_member("a", size=64 << 20), io.BytesIO(bytes(64 << 20)))
    with open(tmp_path / "x", "rb") as file:
        extract_refused(tmp_path / "x", "unpacks to more than 1048576 bytes", max_bytes=1 << 20)
        with (
            pytest.raises(ValueError, match="x unpacks to more than"),
            open_archive(file, "x", max_bytes=1 << 20) as members,
        ):
            next(members)


def test_many_empty_members_are_beyond_the_bound(tmp_path):
    members = [tar_member(str(number), type=tarfile.DIRTYPE) for number in range(300)]
    archive = make_tar(tmp_path / "x", *members)
    extract_refused(archive, "unpacks to more than 1000000 bytes", max_bytes=1_000_000)


def test_a_header_of_another_size_than_a_header_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x", "w:gz") as archive:
        name = tar_member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=8 << 20)
        archive.addfile(name, io.BytesIO(b"a" * (8 << 20)))
        archive.addfile(tar_member("a"))
    extract_refused(tmp_path / "x", "a header has 8388608 bytes")


def test_a_disk_that_cannot_be_written_is_reported_with_both_names(tmp_path):
    archive = make_tar(tmp_path / "x", tar_member("a" * 300))  # longer than a name may be
    with pytest.raises(OSError, match=r"cannot extract .*x to .*folder"):
        safe_extract(archive, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [archive]
