import pytest

from hdscale.errors import UserError
from hdscale.shards.labels import label_rule
from hdscale.shards.sources.classes import read_classes


@pytest.mark.parametrize("option", ["", "json", "json:", "CLS", "label"])
def test_other_rules_are_refused(option):
    with pytest.raises(UserError, match=r"--labels must be auto, cls, none, or json:FIELD such as json:label, got"):
        label_rule(option, None)


def test_class_names_are_lines(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("tench, Tinca tinca\nmüll\n", encoding="utf-8")
    assert read_classes(path) == ("tench, Tinca tinca", "müll")


def test_a_byte_order_mark_is_no_part_of_a_class_name(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufefftench\nmüll\n", encoding="utf-8")
    assert read_classes(path) == ("tench", "müll")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: give one class name a line"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "line 3 repeats the name 'a' of line 1"),
        (b"\xff", "cannot be read"),
    ],
)
def test_files_that_are_no_class_names_are_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--classes .*names.txt:? {message}"):
        read_classes(path)


def test_a_missing_file_of_class_names_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"--classes .*names.txt cannot be read \(No such file or directory\): give a text file"
    ):
        read_classes(tmp_path / "names.txt")
