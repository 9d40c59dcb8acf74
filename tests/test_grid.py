from hdscale.grid import grid, markdown_grid

HEADER = ("model", "accuracy %", "layers")
ROWS = [("raw pixels", "9.5", "-"), ("a|b", "100.0", "1 2 3 4")]


def test_a_plain_table_is_as_wide_as_its_cells_and_has_its_figures_flush_right():
    assert grid(HEADER, ROWS, ruled=True) == [
        "model       accuracy %   layers",
        "----------  ----------  -------",
        "raw pixels         9.5        -",
        "a|b              100.0  1 2 3 4",
    ]


def test_each_column_is_flush_with_the_side_it_asks_for_and_no_line_ends_in_spaces():
    assert grid(HEADER, ROWS, align="><<") == [
        "     model  accuracy %  layers",
        "raw pixels  9.5         -",
        "       a|b  100.0       1 2 3 4",
    ]


def test_a_markdown_table_escapes_what_would_end_a_cell():
    assert markdown_grid(HEADER, ROWS) == [
        "| model      | accuracy % |  layers |",
        "| ---------- | ---------: | ------: |",
        "| raw pixels |        9.5 |       - |",
        "| a\\|b       |      100.0 | 1 2 3 4 |",
    ]
    assert markdown_grid(HEADER, ROWS, padded=False) == [
        "| model | accuracy % | layers |",
        "|---|---|---|",
        "| raw pixels | 9.5 | - |",
        "| a\\|b | 100.0 | 1 2 3 4 |",
    ]


def test_a_table_without_rows_is_its_header():
    assert grid(HEADER, []) == ["model  accuracy %  layers"]
    assert markdown_grid(HEADER, [])[1:] == ["| ----- | ---------: | -----: |"]
