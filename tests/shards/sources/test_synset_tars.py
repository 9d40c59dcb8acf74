import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from hdscale.errors import UserError
from hdscale.shards.sources.synset_tars import SynsetTars


def jpeg(number):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_file(contents, format=tarfile.PAX_FORMAT):
    """Return a tar file; a content is bytes, or a member without any."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in contents:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


def pictures(synset, count):
    return [(f"{synset}_{number}.JPEG", jpeg(hash_of(synset) + number)) for number in reversed(range(count))]


def hash_of(text):
    return sum(text.encode()) * 1000


@pytest.fixture
def contents():
    return {synset: pictures(synset, count) for synset, count in (("n02", 3), ("n01", 2), ("n10", 1))}


@pytest.fixture(params=["folder", "outer tar"])
def source(request, tmp_path):
    """Write tars by class, as a folder or inside one tar; return the source."""

    def write(tars, **options):
        tars = {name: data if isinstance(data, bytes) else tar_file(data) for name, data in tars.items()}
        if request.param == "folder":
            (tmp_path / "tars").mkdir()
            for name, data in tars.items():
                (tmp_path / "tars" / f"{name}.tar").write_bytes(data)
            return SynsetTars(tmp_path / "tars", **options)
        (tmp_path / "outer.tar").write_bytes(tar_file([(f"whole/{name}.tar", data) for name, data in tars.items()]))
        return SynsetTars(tmp_path / "outer.tar", **options)

    return write


def read_all(source, listing):
    return {name: source.read(name, place).data for name, place in zip(listing.names, listing.places, strict=True)}


def test_classes_are_the_sorted_tars_and_pictures_the_sorted_members(source, contents):
    tars = source(contents)
    listing = tars.listing()
    assert listing.classes == ("n01", "n02", "n10")
    names = ["n01/n01_0.JPEG", "n01/n01_1.JPEG", "n02/n02_0.JPEG", "n02/n02_1.JPEG", "n02/n02_2.JPEG", "n10/n10_0.JPEG"]
    assert list(listing.names) == names
    assert listing.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert (listing.left_out, listing.damaged) == ([], ())
    expected = {f"{synset}/{name}": data for synset, members in contents.items() for name, data in members}
    assert read_all(tars, listing) == expected


def test_a_list_of_classes_gives_the_labels(source, contents):
    listing = source(contents, only=("n10", "n01")).listing()
    assert listing.classes == ("n10", "n01")
    assert list(listing.names) == ["n10/n10_0.JPEG", "n01/n01_0.JPEG", "n01/n01_1.JPEG"]
    assert listing.labels.tolist() == [0, 1, 1]
    assert listing.left_out == ["1 classes that --only-classes does not name"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_tar_format_are_read(source, format):
    name = "/".join(["d" * 60] * 3) + "/x.JPEG"
    tars = source({"n01": tar_file([(name, jpeg(1))], format)})
    assert read_all(tars, tars.listing()) == {f"n01/{name}": jpeg(1)}


def test_members_that_are_no_pictures_are_counted_and_not_taken(source):
    hostile = [
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        special("device.jpg", tarfile.CHRTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("folder.jpg", tarfile.DIRTYPE),
        ("../up.jpg", jpeg(2)),
        ("a/../../up.jpg", jpeg(2)),
        ("/etc/absolute.jpg", jpeg(2)),
        ("notes.txt", b"text"),
    ]
    listing = source({"n01": [*hostile, ("./good.jpg", jpeg(1)), ("._good.jpg", b"hidden")]}).listing()
    assert list(listing.names) == ["n01/good.jpg"]
    (words,) = listing.left_out
    assert words.startswith("9 tar members that are no regular .jpg")


def test_the_first_of_two_members_of_one_name_is_taken(source):
    tars = source({"n01": [("a.jpg", jpeg(1)), ("a.jpg", jpeg(2))]})
    listing = tars.listing()
    assert read_all(tars, listing) == {"n01/a.jpg": jpeg(1)}
    assert listing.left_out[0].startswith("1 tar members")


CUTS = {  # how, and how many of three pictures are before the cut
    "inside a picture": (lambda data: data[: member_end(data, 2) - 600], 1),
    "inside a header": (lambda data: data[: member_end(data, 2) + 100], 2),
    "between members": (lambda data: data[: member_end(data, 2)], 2),
    "before the end mark": (lambda data: data[: member_end(data, 3)], 3),
    "no tar at all": (lambda _: b"<html>Not found</html>" * 100, 0),
    "no bytes": (lambda _: b"", 0),
}


def member_end(data, count):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[count - 1]
    return last.offset_data + -(-last.size // 512) * 512


@pytest.mark.parametrize("synset", ["n02", "n10"])  # in the outer tar, another one or the end follows
@pytest.mark.parametrize("cut", CUTS)
def test_a_tar_cut_short_is_told_and_keeps_its_label_and_the_others(source, contents, cut, synset):
    function, num_whole = CUTS[cut]
    contents = contents | {synset: pictures(synset, 3)}
    tars = source(contents | {synset: function(tar_file(contents[synset]))})
    listing = tars.listing()
    assert listing.classes == ("n01", "n02", "n10")
    (words,) = listing.damaged
    assert words.startswith(f"{synset}.tar is cut short (")
    assert f"the {num_whole} pictures before the cut" in words
    assert listing.left_out == []
    members = [(name, picture) for name, picture in contents.items() if name != synset]
    members.append((synset, contents[synset][:num_whole]))
    assert read_all(tars, listing) == {f"{name}/{file}": data for name, files in members for file, data in files}


def header(name, size, kind=tarfile.REGTYPE):
    """Return the header of a member that claims any size."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax_member(**records):
    member = tarfile.TarInfo("odd.jpg")
    member.pax_headers = records
    return member.tobuf(tarfile.PAX_FORMAT)


COMMENT = header("comment", 19, tarfile.XHDTYPE) + b"19 comment=12345 67".ljust(512, b"\0")
HOSTILE = {
    "a size that leads back to the same header": header("odd.jpg", -512),
    "a size that leads back further": header("odd.jpg", -1024),
    "a long name of a negative size": header("odd", -512, tarfile.GNUTYPE_LONGNAME) + bytes(512),
    "an extended header of exabytes": header("odd", 1 << 62, tarfile.XHDTYPE) + bytes(512),
    "headers of headers": COMMENT * 1500,
    "a negative size in words": pax_member(size="-512"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_headers_that_mislead_tarfile_end_their_tar_only(source, contents, data):
    before = tar_file(contents["n01"])[: member_end(tar_file(contents["n01"]), 2)]
    tars = source(contents | {"n01": before + data + tar_file([("after.jpg", jpeg(0))])})
    listing = tars.listing()
    (words,) = listing.damaged
    assert words.startswith("n01.tar is cut short (")
    assert len(words) < 400
    expected = {f"{name}/{file}": picture for name, files in contents.items() for file, picture in files}
    assert read_all(tars, listing) == expected


@pytest.mark.parametrize("record", ["GNU.sparse.size", "GNU.sparse.map"])
def test_sparse_files_whose_maps_make_no_sense_are_walked_past(source, record):
    after = tar_file([("after.jpg", jpeg(1))])
    tars = source({"n01": pax_member(**{record: "1,x"}) + after})
    listing = tars.listing()
    assert read_all(tars, listing) == {"n01/after.jpg": jpeg(1)}
    assert listing.damaged == ()
    assert listing.left_out[0].startswith("1 tar members")


def test_the_size_in_an_extended_header_counts(source):
    """It alone is right for files of more than 8 GiB, such as the tars of large classes."""
    data = jpeg(1)
    member = pax_member(size=str(len(data))) + data.ljust(-(-len(data) // 512) * 512, b"\0")
    tars = source({"n01": member + tar_file([("after.jpg", jpeg(2))])})
    listing = tars.listing()
    assert read_all(tars, listing) == {"n01/odd.jpg": data, "n01/after.jpg": jpeg(2)}
    assert (listing.left_out, listing.damaged) == ([], ())


def test_what_stands_behind_the_end_of_a_tar_is_no_damage(source, contents):
    tars = source({"n01": tar_file(contents["n01"]) + tar_file(contents["n02"])})
    assert list(tars.listing().names) == ["n01/n01_0.JPEG", "n01/n01_1.JPEG"]
    assert tars.listing().damaged == ()


def test_hidden_members_and_folders_are_not_counted(source):
    folders = [special(name, tarfile.DIRTYPE) for name in ("./", "./.cache/", "a/.cache/")]
    listing = source({"n01": [*folders, ("good.jpg", jpeg(1)), ("a/.DS_Store", b"")]}).listing()
    assert (list(listing.names), listing.left_out) == (["n01/good.jpg"], [])


def test_a_class_without_pictures_is_told_and_keeps_its_label(source, contents):
    listing = source(contents | {"n02": [("notes.txt", b"")]}).listing()
    assert listing.classes == ("n01", "n02", "n10")
    assert listing.labels.tolist() == [0, 0, 2]
    assert "class n02, whose tar holds no pictures" in listing.left_out


def test_an_outer_tar_cut_short_is_refused(tmp_path, contents):
    whole = tar_file([(f"{name}.tar", tar_file(members)) for name, members in contents.items()])
    for size in (member_end(whole, 2), member_end(whole, 2) - 512, member_end(whole, 2) + 100):
        (tmp_path / "outer.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"outer.tar is no whole, uncompressed tar .*copy it again, or unpack it"):
            SynsetTars(tmp_path / "outer.tar").listing()


def test_a_compressed_outer_tar_is_refused(tmp_path, contents):
    with tarfile.open(tmp_path / "outer.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("n01.tar"))
    with pytest.raises(UserError, match="is no whole, uncompressed tar"):
        SynsetTars(tmp_path / "outer.tar").listing()


def test_two_tars_of_one_class_are_refused(tmp_path, contents):
    inner = tar_file(contents["n01"])
    (tmp_path / "outer.tar").write_bytes(tar_file([("a/n01.tar", inner), ("b/n01.tar", inner)]))
    with pytest.raises(UserError, match=r"outer.tar holds two n01.tar"):
        SynsetTars(tmp_path / "outer.tar").listing()


def test_files_that_are_no_tars_are_counted(tmp_path, contents):
    (tmp_path / "n01.tar").write_bytes(tar_file(contents["n01"]))
    for name in ("n02.tar.gz", "readme.txt", ".hidden.tar"):
        (tmp_path / name).write_bytes(b"")
    assert SynsetTars(tmp_path).listing().left_out == ["2 members of --input that are no .tar files"]


def test_an_input_without_tars_or_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is neither a folder of tars nor a tar of tars"):
        SynsetTars(tmp_path / "nowhere").listing()
    with pytest.raises(UserError, match=r"holds no CLASS.tar"):
        SynsetTars(tmp_path).listing()
    (tmp_path / "n01.tar").write_bytes(tar_file([("notes.txt", b"")]))
    with pytest.raises(UserError, match=r"none of 1 tars holds .jpg"):
        SynsetTars(tmp_path).listing()


def test_a_tar_that_shrank_since_the_run_began_is_no_bad_picture(tmp_path, contents):
    path = tmp_path / "n01.tar"
    path.write_bytes(tar_file(contents["n01"]))
    tars = SynsetTars(tmp_path)
    listing = tars.listing()
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match=r"n01.tar is shorter than when the run began"):
        tars.read(listing.names[0], listing.places[0])
