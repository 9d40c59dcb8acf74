import pytest
from PIL import Image

from hdscale.errors import UserError
from hdscale.shards.sources.csv_list import CsvList


@pytest.fixture
def listed(tmp_path):
    """Write a CSV file and return its source."""

    def write(text, **options):
        (tmp_path / "list.csv").write_text(text, encoding="utf-8")
        return CsvList(tmp_path / "list.csv", **options)

    return write


def test_class_names_are_sorted_and_pictures_too(listed):
    listing = listed("path,label\nz.jpg,dog\nb/y.jpg,cat\na.png,dog\n").listing()
    assert listing.classes == ("cat", "dog")
    assert listing.names == ["a.png", "b/y.jpg", "z.jpg"]
    assert listing.labels.tolist() == [1, 0, 1]


def test_other_columns_spaces_blank_lines_quotes_and_a_byte_order_mark_do_not_matter(listed):
    listing = listed('\ufeffpath, label ,id\n"a, b.jpg", cat ,1\n\nc.jpg,dog,2\n').listing()
    assert listing.names == ["a, b.jpg", "c.jpg"]
    assert listing.classes == ("cat", "dog")


def test_integers_without_gaps_stay_as_they_are(listed):
    lines = "".join(f"{number}.jpg,{number % 11}\n" for number in range(22))
    listing = listed("path,label\n" + lines).listing()
    assert listing.classes == tuple(map(str, range(11)))
    assert dict(zip(listing.names, listing.labels.tolist(), strict=True))["21.jpg"] == 10


def test_numbers_with_leading_zeros_are_names(listed):
    assert listed("path,label\na.jpg,007\nb.jpg,003\n").listing().classes == ("003", "007")


def test_a_label_of_thousands_of_digits_is_a_name(listed):
    assert listed(f"path,label\na.jpg,0\nb.jpg,{'1' * 5000}\n").listing().classes == ("0", "1" * 5000)


def test_a_list_of_classes_gives_the_labels(listed):
    listing = listed("path,label\na.jpg,7\nb.jpg,5\nc.jpg,-1\n", only=("7", "5")).listing()
    assert listing.classes == ("7", "5")
    assert dict(zip(listing.names, listing.labels.tolist(), strict=True)) == {"a.jpg": 0, "b.jpg": 1}
    assert listing.left_out == ["1 classes that --only-classes does not name"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: must name the columns path and label, got ''"),
        ("file,class\na.jpg,1\n", r"line 1: must name the columns path and label, got 'file,class'"),
        ("path,label,path\n", r"line 1: must name"),
        ("path,label\n", r"list.csv lists no pictures"),
        ("path,label\na.jpg,1\nb.jpg\n", r"line 3: has no label"),
        ("path,label\na.jpg,\n", r"line 2: has no label"),
        ("path,label\n,1\n", r"line 2: has no path"),
        ("path,label\na.jpg,x\n\nb.jpg,x\na.jpg,y\n", r"line 5: path a.jpg is on line 2 already"),
        ('path,label\na.jpg,x\n"b.jpg,x\n', r"line 3: is no CSV"),
        ("path,label\na.jpg,0\nb.jpg,2\n", r"integer labels must be 0 .. n - 1 without gaps, got 2 from 0 to 2"),
        ("path,label\na.jpg,-1\nb.jpg,0\n", r"got 2 from -1 to 0"),
        ("path,label\na.jpg,0\nb\0.jpg,0\n", r"line 3: has a zero byte in its path"),
    ],
)
def test_lines_that_break_a_rule_are_named(listed, text, message):
    with pytest.raises(UserError, match=message):
        listed(text).listing()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--input .*nowhere.csv cannot be read \(No such file"):
        CsvList(tmp_path / "nowhere.csv").listing()
    (tmp_path / "binary.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    with pytest.raises(UserError, match=r"is not UTF-8 text"):
        CsvList(tmp_path / "binary.csv").listing()


def test_relative_paths_begin_at_the_root_or_beside_the_file(listed, tmp_path):
    for folder, size in (("a", (3, 2)), ("root/a", (5, 4))):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", size).save(tmp_path / folder / "1.png")
    text = "path,label\na/1.png,0\n"
    assert listed(text).read("a/1.png")[2:] == (3, 2)
    assert listed(text, root=tmp_path / "root").read("a/1.png")[2:] == (5, 4)
    assert listed(text).read(str(tmp_path / "root/a/1.png"))[2:] == (5, 4)
