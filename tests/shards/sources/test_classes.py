import pytest

from hdscale.errors import UserError
from hdscale.shards.sources.classes import choose_classes, read_class_list


def written(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    return tmp_path / "classes.txt"


def test_blank_lines_and_comments_are_ignored_and_the_order_stays(tmp_path):
    text = "\ufeffn02\n\n# birds\n  n01  # tench\nc#\n"
    assert read_class_list(written(tmp_path, text)) == ("n02", "n01", "c#")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na # again\n", r"classes.txt, line 3: a is on line 1 already"),
        ("# nothing\n\n", r"classes.txt names no class"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_class_list(written(tmp_path, text))


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--only-classes .*nowhere.txt cannot be read \(No such file"):
        read_class_list(tmp_path / "nowhere.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot be read \(it is not UTF-8 text\)"):
        read_class_list(tmp_path / "binary")


def test_without_a_list_all_classes_are_taken():
    assert choose_classes(["a", "b"], None, "here") == (["a", "b"], [])


def test_a_class_whose_name_is_no_text_is_refused_before_the_work():
    with pytest.raises(UserError, match=r"--input x has the class 'b\\udcff', whose name is no UTF-8: rename it"):
        choose_classes(["a", "b\udcff", "é"], None, "--input x")


def test_chosen_classes_have_the_lists_order_and_the_rest_is_counted():
    chosen, left_out = choose_classes(["a", "b", "c", "d"], ("c", "a"), "here")
    assert chosen == ["c", "a"]
    assert left_out == ["2 classes that --only-classes does not name"]
    assert choose_classes(["a"], ("a",), "here") == (["a"], [])


def test_classes_that_are_missing_are_counted_and_the_first_named():
    only = ("a", *(f"x{number}" for number in range(9)))
    with pytest.raises(UserError, match=r"names 9 of 10 classes that here lacks \(x0, x1, x2, x3, x4, ...\)"):
        choose_classes(["a", "b"], only, "here")
