import hashlib
import io
import random
import tarfile

import pytest

from hdscale.shards import tar_reader as tar_module
from hdscale.shards.tar_reader import FILE, BadTar, Member, TarReader, TrailingData, printable

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {
    tarfile.REGTYPE: FILE,
    tarfile.AREGTYPE: FILE,
    tarfile.CONTTYPE: FILE,
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "fifo",
}


def add(tar, name, data=b"", kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write(path, names, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            add(tar, name, bytes([number % 256]) * (number * 37))
    return path


def members(path, hashed=False):
    """All members, with the names of folders as tarfile gives them."""
    with TarReader(path, hashed) as tar:
        return [
            member._replace(name=member.name.rstrip("/")) if member.kind == "directory" else member
            for member in tar.members()
        ]


def as_tarfile_sees_it(path):
    with tarfile.open(path, "r:", errors="surrogateescape") as tar:
        return [Member(info.name, KINDS[info.type], info.offset_data, info.size) for info in tar]


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_random_trees_are_walked_as_by_tarfile(tmp_path, form, hashed, monkeypatch):
    monkeypatch.setattr(tar_module, "_ALL_READ", 3000)  # so that reads end inside of headers and data
    monkeypatch.setattr(tar_module, "_HEADERS_READ", 1300)
    generator = random.Random(7)
    for number in range(40):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=FORMATS[form]) as tar:
            for _ in range(generator.randrange(30)):
                longest = 90 if form == "ustar" else 400
                letters = generator.choices("abc.-_ é\u4e2d" if form != "ustar" else "abc.-_", k=longest)
                name = "x" + "".join(letters)[: generator.randrange(1, longest)]
                if form == "ustar" and generator.random() < 0.3:
                    name = "folder/" * 18 + name[:60]  # goes into the prefix
                kind = generator.choice([tarfile.REGTYPE] * 6 + [*KINDS])
                data = generator.randbytes(generator.choice([0, 1, 511, 512, 513, 5000]))
                link = {"linkname": "t" * generator.randrange(1, longest)} if kind in (b"1", b"2") else {}
                add(tar, name, data if KINDS[kind] == FILE else b"", kind, **link)
        assert members(path, hashed) == as_tarfile_sees_it(path)
        with TarReader(path, hashed=True) as reader:
            for member in reader.members():
                assert reader.read(member.offset, member.size) == path.read_bytes()[member.offset :][: member.size]
            assert reader.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("hashed", [False, True])
def test_a_tar_inside_another_file_is_read_as_if_it_were_alone(tmp_path, hashed):
    alone = write(tmp_path / "a.tar", [f"{number}.jpg" for number in range(60)], tarfile.GNU_FORMAT)
    data = alone.read_bytes()
    start, end = 1000, 1000 + len(data)  # no multiple of a block: offsets are counted from the tar's own start
    around = tmp_path / "around"
    around.write_bytes(b"b" * start + data + b"a" * 9000)
    with TarReader(around, hashed, start, end) as tar:
        for member, expected in zip(tar.members(), as_tarfile_sees_it(alone), strict=True):
            assert member == expected
            assert tar.read(member.offset, member.size) == data[member.offset :][: member.size]
        assert not hashed or tar.sha256() == hashlib.sha256(data).hexdigest()
        assert not tar.changed()
    with TarReader(around, hashed, start, start + 3100) as tar, pytest.raises(BadTar, match=r"is cut at byte 3100: "):
        list(tar.members())


def test_bytes_that_are_no_utf8_stay_in_names(tmp_path):
    path = write(tmp_path / "a.tar", ["b\udce9.jpg"], tarfile.GNU_FORMAT)
    assert members(path) == as_tarfile_sees_it(path)
    assert members(path)[0].name == "b\udce9.jpg"


def test_the_digest_is_of_the_whole_file_wherever_the_walk_ended(tmp_path):
    path = write(tmp_path / "a.tar", ["a", "b", "c"])
    for count in range(4):
        with TarReader(path, hashed=True) as tar:
            for _, _ in zip(range(count), tar.members(), strict=False):
                pass
            assert tar.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 1 << 40])
def test_sizes_beyond_eight_gibibytes_are_read(tmp_path, size):
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    path = tmp_path / "a.tar"
    with path.open("wb") as file:  # a sparse file
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + -(-size // 512) * 512)
        file.seek(0, 2)
        file.write(tarfile.TarInfo("b.jpg").tobuf() + bytes(1024))
    assert [member.size for member in members(path)] == [size, 0]


def test_the_size_in_a_pax_header_counts_but_such_a_file_is_not_taken(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "600"}
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024) + tarfile.TarInfo("b.jpg").tobuf() + bytes(1024))
    first, second = members(path)
    assert (first.size, second.name) == (600, "b.jpg")
    assert first.refusal() == "is a file whose headers disagree about its size"


def test_global_pax_headers_hold_for_all_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of git archive"}) as tar:
        add(tar, "a.jpg", b"12")
    assert members(path) == as_tarfile_sees_it(path)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("a.jpg", tarfile.REGTYPE, None),
        ("a..b/c..jpg", tarfile.REGTYPE, None),
        ("../a.jpg", tarfile.REGTYPE, "has a name with .. in it"),
        ("a/../b.jpg", tarfile.REGTYPE, "has a name with .. in it"),
        ("/a.jpg", tarfile.REGTYPE, "has an absolute name"),
        ("a" * 5000, tarfile.REGTYPE, "has a name of more than 4096 characters"),
        ("a.jpg", tarfile.SYMTYPE, "is a symbolic link"),
        ("a.jpg", tarfile.LNKTYPE, "is a hard link"),
        ("a.jpg", tarfile.CHRTYPE, "is a character device"),
        ("a.jpg", tarfile.FIFOTYPE, "is a fifo"),
        ("a", tarfile.DIRTYPE, "is a directory"),
        ("a.jpg", b"q", "is a member of the unknown type b'q'"),
    ],
)
def test_members_that_are_not_taken(tmp_path, name, kind, reason):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, name, kind=kind)
    (member,) = members(tmp_path / "a.tar")
    assert member.refusal() == reason


def test_sparse_files_are_walked_past(tmp_path):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"00000001000\0"  # 512 bytes
    header[156:157], header[482] = b"S", 1
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) + bytes(512) + b"d" * 512 + tarfile.TarInfo("b.jpg").tobuf() + bytes(1024))
    first, second = members(path)
    assert (first.refusal(), first.offset, second.name) == ("is a sparse file", 1024, "b.jpg")


def walked_until_bad(path, hashed=False):
    names = []
    with TarReader(path, hashed) as tar, pytest.raises(BadTar) as caught:
        names.extend(member.name for member in tar.members() if member.kind == FILE)
    return names, caught


@pytest.mark.parametrize(
    ("magic", "name"), [(b"\x1f\x8b", "gzip"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")]
)
def test_compressed_tars_are_refused_without_unpacking(tmp_path, magic, name):
    (tmp_path / "a.tar").write_bytes(magic + bytes(2000))
    _, caught = walked_until_bad(tmp_path / "a.tar")
    assert f"compressed tar ({name})" in str(caught.value)
    assert "unpack it" in str(caught.value)


@pytest.mark.parametrize(("content", "reason"), [(b"", "is empty"), (b"a" * 9, "is no tar"), (b"a" * 999, "is no tar")])
def test_files_that_are_no_tars_are_refused(tmp_path, content, reason):
    (tmp_path / "a.tar").write_bytes(content)
    assert reason in str(walked_until_bad(tmp_path / "a.tar")[1].value)


@pytest.mark.parametrize("hashed", [False, True])
def test_a_tar_cut_anywhere_gives_its_whole_members_and_says_so(tmp_path, hashed):
    path = write(tmp_path / "a.tar", ["a", "b", "c", "d"])
    whole, data = as_tarfile_sees_it(path), path.read_bytes()
    end = whole[-1].offset + 512
    for size in range(1, end + 1, 100 if hashed else 7):
        path.write_bytes(data[:size])
        names, caught = walked_until_bad(path, hashed)
        assert names == [member.name for member in whole if member.offset + member.size <= size]
        assert "is cut" in str(caught.value) or "may be cut" in str(caught.value) or size < 512


def test_a_tar_cut_between_two_members_is_told_from_a_whole_one(tmp_path):
    path = write(tmp_path / "a.tar", ["a", "b"])
    path.write_bytes(path.read_bytes()[:1536])
    names, caught = walked_until_bad(path)
    assert names == ["a", "b"]
    assert str(caught.value) == "has no end of archive: it may be cut at byte 1536, after a whole member"


def test_a_flipped_bit_in_a_header_ends_the_walk(tmp_path):
    path = write(tmp_path / "a.tar", ["a", "b", "c"])
    data = bytearray(path.read_bytes())
    for bit in range(0, 8 * 512, 41):
        flipped = bytearray(data)
        flipped[512 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if bit // 8 in range(148, 156):
            continue  # spaces and zeros of the checksum itself may mean the same
        names, caught = walked_until_bad(path)
        assert (names, str(caught.value)) == (["a"], "is damaged at byte 512: no header of a member is there")


def test_checksums_of_signed_characters_are_known(tmp_path):
    header = bytearray(tarfile.TarInfo("\udcff\udcfe.jpg").tobuf(tarfile.USTAR_FORMAT, errors="surrogateescape"))
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256 - 512)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    assert members(tmp_path / "a.tar") == as_tarfile_sees_it(tmp_path / "a.tar")


def test_two_tars_put_together_with_cat_are_noticed(tmp_path):
    first, second = (write(tmp_path / name, [name]).read_bytes() for name in ("a", "b"))
    path = tmp_path / "both.tar"
    path.write_bytes(first + second)
    names, caught = walked_until_bad(path)
    assert names == ["a"]
    assert caught.type is TrailingData
    assert "has 19968 bytes behind the end of its archive, at byte 512" in str(caught.value)


def test_small_tars_put_together_are_noticed_inside_the_padding_of_one(tmp_path):
    unpadded = write(tmp_path / "a", ["a"]).read_bytes()[: 3 * 512]
    path = tmp_path / "both.tar"
    path.write_bytes(unpadded + unpadded)
    names, caught = walked_until_bad(path)
    assert names == ["a"]
    assert caught.type is TrailingData


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_huge_extended_headers_are_not_read(tmp_path, kind):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, 1 << 30
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(2 << 30)
    _, caught = walked_until_bad(tmp_path / "a.tar")
    assert "has an extended header of 1073741824 bytes at byte 512, more than 1048576" in str(caught.value)


@pytest.mark.parametrize(
    "records", [b"5 a=b", b"99 path=a\n", b"x path=a\n", b"0 path=a\n", b"7 path\n", b"-9 path=a\n", b"9" * 30]
)
def test_broken_pax_records_are_told(tmp_path, records):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    (tmp_path / "a.tar").write_bytes(info.tobuf() + records.ljust(512, b"\0") + bytes(2048))
    _, caught = walked_until_bad(tmp_path / "a.tar")
    assert "the records of an extended header cannot be read" in str(caught.value)


@pytest.mark.parametrize("size", ["-5", "1e3", "", "9" * 21])
def test_a_broken_size_in_a_pax_header_is_told(tmp_path, size):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": size}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    _, caught = walked_until_bad(tmp_path / "a.tar")
    assert "an extended header has the size" in str(caught.value)


def test_a_negative_size_is_no_size(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size = -512
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert str(walked_until_bad(tmp_path / "a.tar")[1].value) == "is no tar file"


def test_a_file_that_somebody_writes_to_is_noticed(tmp_path):
    path = write(tmp_path / "a.tar", ["a", "b", "c"])
    with TarReader(path, hashed=True) as tar:
        assert not tar.changed()
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(BadTar, match=r"became shorter than \d+ bytes while it was read"):
            list(tar.members())
        assert tar.changed()


def test_names_in_messages_are_short_and_printable():
    assert printable("a\n\x1b[2Jé\udce9") == "a\\n\\x1b[2Jé\\udce9"
    assert len(printable("\n" * 1000)) == 200
