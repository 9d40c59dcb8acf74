import csv
import io
import math

import pytest

from hdscale.ablation.measuring import Measures
from hdscale.ablation.rendering import Report, render_csv, render_markdown
from hdscale.ablation.results import RowResult, difference, pairs
from hdscale.ablation.table import Paper, Row, Table
from hdscale.analysis.curves import AttentionCurves
from hdscale.evaluation.accuracy import accuracy_of

TABLE = Table(
    "8",
    "masks",
    "none",
    (
        Row("teacher", "MAE", model="@mae"),
        Row("none", "No, 100 %", paper=Paper(50.0, 43.9)),
        Row("random", "Random | 35 %", paper=Paper(49.2, 43.3)),
    ),
    notes=("A note.",),
)


def measures(knn, probe=90, distance=15.0, nmi=0.1, trained=True, decoder=None):
    # Three layers of two heads, of which the second one looks further.
    distances = ((16.0, 16.0), (15.0, 19.0), (distance - 3, distance + 3))
    curves = AttentionCurves(distances, ((0.0, 0.0), (0.0, 0.1), (nmi - 0.05, nmi + 0.05)))
    environment = {"git_revision": "abc"} if trained else None
    rate, gflops, ratio = (200.0, 0.0123, 0.699) if trained else (None, None, None)
    return Measures(accuracy_of(knn, 100), accuracy_of(probe, 100), curves, decoder, gflops, rate, environment, ratio)


def result(key, *of):
    folders = tuple(f"{key}-{seed}" for seed in range(len(of))) if key != "teacher" else ()
    return RowResult(TABLE.row(key), folders, of)


def report(*results, seeds=1, **more):
    return Report(TABLE, results, seeds, "python launch/ablate.py 8", **more)


def test_one_seed_is_judged_by_the_error_of_its_held_out_samples():
    none, random = result("none", measures(90)), result("random", measures(80))
    figure = none.figure("knn")
    assert figure == pytest.approx((90.0, 3.0, 3.0))
    found = difference(random, none, "knn")
    assert found.value == pytest.approx(-10)
    assert found.standard_error == pytest.approx(math.hypot(3.0, 4.0))
    assert found.is_clear  # -10 of 5
    assert not difference(result("random", measures(81)), none, "knn").is_clear
    # Nothing is known of how far another seed's attention would be.
    assert none.figure("head_distance") == (15.0, None, None)
    assert difference(random, none, "nmi") is None


def test_several_seeds_are_judged_by_their_own_spread():
    none = result("none", measures(90), measures(91), measures(92))
    random = result("random", measures(89), measures(89), measures(92))
    assert none.figure("knn") == pytest.approx((91.0, 1.0, 1 / math.sqrt(3)))
    assert random.figure("knn") == pytest.approx((90.0, math.sqrt(3), 1.0))
    found = difference(random, none, "knn")
    assert found == pytest.approx((-1.0, math.sqrt(1 / 3 + 1)))
    assert not found.is_clear
    # Seeds that agree to the sample fall back on the held-out samples' error.
    agreeing = result("none", measures(90), measures(90))
    assert agreeing.figure("knn") == pytest.approx((90.0, 0.0, 3.0))


def test_rows_that_are_one_run_and_rows_without_training_are_not_compared():
    teacher, none = result("teacher", measures(50, trained=False)), result("none", measures(90))
    same = result("random", measures(80))._replace(folders=none.folders)
    assert pairs(TABLE, [teacher, none, same]) == []
    assert [(a.row.key, b.row.key) for a, b in pairs(TABLE, [none, result("random", measures(80))])] == [
        ("random", "none")
    ]


def test_the_page_has_the_paper_s_column_beside_ours_and_says_what_is_no_difference():
    text = render_markdown(
        report(
            result("teacher", measures(50, trained=False)),
            result("none", measures(90, probe=98)),
            result("random", measures(82, probe=70)),
            machine="2 cores",
            notes=("Digits.",),
        )
    )
    lines = text.splitlines()
    assert lines[0] == "# Table 8: masks"
    assert lines[2] == "`python launch/ablate.py 8`, commit abc, on 2 cores"
    assert len({len(line) for line in lines[4:9]}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[4:9]]
    assert cells[0][:5] == ["row", "paper: AP box", "paper: AP mask", "k-NN %", "linear probe %"]
    assert cells[0][5:7] == ["head distance px", "px over heads: sd (range)"]
    assert cells[0][7:9] == ["NMI", "NMI over heads: sd (range)"]
    assert cells[0][9:] == ["GFLOP a step and image", "times one teacher", "images/s"]
    heads = ["15.0", "3.0 (12.0 .. 18.0)", "0.10", "0.05 (0.05 .. 0.15)"]
    assert cells[2] == ["MAE", "-", "-", "50.0 +- 5.0", "90.0 +- 3.0", *heads, "-", "-", "-"]
    ours = ["90.0 +- 3.0", "98.0 +- 1.4", *heads, "0.0123", "0.70", "200"]
    assert cells[3] == ["No, 100 %", "50.0", "43.9", *ours]
    ours = ["82.0 +- 3.8", "70.0 +- 4.6", *heads, "0.0123", "0.70", "200"]
    assert cells[4] == ["Random \\| 35 %", "49.2", "43.3", *ours]
    assert "- Digits." in lines
    assert "- A note." in lines
    assert (
        "- Random | 35 % against No, 100 %: k-NN -8.0 points (no difference); linear probe -28.0 points (standard "
        "error 4.8); the paper: AP box -0.8, AP mask -0.6."
    ) in lines
    assert "one seed: how far another would be is unknown" in text
    assert "of the last layer, mean over heads, and its heads' standard deviation (smallest .. largest); GFLOP" in text
    assert "Failed" not in text


def test_heads_that_collapsed_are_seen_beside_heads_that_differ_around_the_same_mean():
    def of(*heads):
        return measures(90)._replace(curves=AttentionCurves((heads,), ((0.1,) * 6,)))

    spread = result("none", of(26.0, 111.0, 108.0, 109.0, 105.0, 81.0))
    collapsed = result("random", of(75.0, 105.0, 90.0, 90.0, 90.0, 90.0))
    lines = render_markdown(report(spread, collapsed)).splitlines()[6:8]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")][5:7] for line in lines]
    assert cells == [["90.0", "30.4 (26.0 .. 111.0)"], ["90.0", "8.7 (75.0 .. 105.0)"]]


def test_heads_of_several_seeds_are_not_mixed_and_their_range_is_that_of_all():
    def of(*heads):
        return measures(90)._replace(curves=AttentionCurves(((10.0, 10.0), heads), ((0.1, 0.1), (0.1, 0.3))))

    found = result("none", of(10.0, 14.0), of(50.0, 58.0))
    assert found.by_layer("head_distance")[1] == (33.0, 3.0, 10.0, 58.0)  # heads of both at once would be 21 apart
    assert found.by_head("head_distance") == [[10.0, 10.0, 10.0, 10.0], [10.0, 14.0, 50.0, 58.0]]
    assert found.figure("head_distance").mean == 33.0
    text = render_markdown(report(found, seeds=2))
    cells = [cell.strip() for cell in text.splitlines()[6].strip("| ").split(" | ")]
    assert cells[5:9] == ["33.0 +- 29.7", "3.0 (10.0 .. 58.0)", "0.20 +- 0.00", "0.10 (0.10 .. 0.30)"]
    assert "(smallest .. largest): sd is the mean over seeds, the range that of all seeds; GFLOP" in text


def test_a_row_without_measures_has_no_heads():
    line = render_markdown(report(result("random"))).splitlines()[6]
    assert [cell.strip() for cell in line.strip("| ").split(" | ")][3:] == ["-"] * 9


def test_a_figure_has_its_curves_over_layers_and_no_column_of_the_paper_s():
    figure = TABLE._replace(key="fig1", rows=(Row("none", "None"), Row("random", "Random")))
    rows = [
        RowResult(figure.rows[0], ("a",), (measures(90), measures(90, distance=13.0))),
        RowResult(figure.rows[1], (), ()),
    ]
    text = render_markdown(
        Report(figure, rows, 2, "python launch/ablate.py fig1", failures={"random, seed 0": "no luck"})
    )
    assert text.startswith("# Figure 1: masks")
    assert "paper: AP" not in text
    assert "| head distance px, layer |    1 |    2 |    3 |" in text
    assert "| None                    | 16.0 | 17.0 | 14.0 |" in text
    assert "| Random                  |    - |    - |    - |" in text
    assert "| head distance px, sd over heads, layer |   1 |   2 |   3 |" in text
    assert "| None                                   | 0.0 | 2.0 | 3.0 |" in text
    assert "| NMI, sd over heads, layer |    1 |    2 |    3 |" in text
    assert "| None                      | 0.00 | 0.05 | 0.05 |" in text
    assert "## Failed\n\n- random, seed 0: no luck\n" in text


def test_the_csv_has_unrounded_numbers_and_empty_cells_for_what_is_unknown():
    text = render_csv(report(result("none", measures(90), measures(91)), result("random"), seeds=2))
    none, random = csv.DictReader(io.StringIO(text))
    error = math.sqrt(0.5) / math.sqrt(2)
    assert none == {
        "table": "8",
        "row": "none",
        "name": "No, 100 %",
        "seeds": "2",
        "paper_ap_box": "50.0",
        "paper_ap_mask": "43.9",
        "paper_miou": "",
        "knn": "90.5",
        "knn_spread": str(math.sqrt(0.5)),
        "knn_standard_error": str(error),
        # Seeds that agree have no spread, and the held-out samples' error; attention has no such error.
        "probe": "90.0",
        "probe_spread": "0.0",
        "probe_standard_error": "3.0",
        "head_distance": "15.0",
        "head_distance_spread": "0.0",
        "head_distance_standard_error": "",
        "nmi": "0.1",
        "nmi_spread": "0.0",
        "nmi_standard_error": "",
        "gflops_per_image": "0.0123",
        "flops_over_one_teacher": "0.699",
        "images_per_second": "200.0",
        "head_distance_by_layer": "16 17 15",
        "nmi_by_layer": "0 0.05 0.1",
        "head_distance_by_decoder_layer": "",
        "nmi_by_decoder_layer": "",
        "runs": "none-0 none-1",
        # Heads of the second seed stand after those of the first.
        "head_distance_by_head": "16 16 16 16; 15 19 15 19; 12 18 12 18",
        "nmi_by_head": "0 0 0 0; 0 0.1 0 0.1; 0.05 0.15 0.05 0.15",
        "head_distance_by_decoder_head": "",
        "nmi_by_decoder_head": "",
    }
    columns = text.partition("\n")[0]
    assert columns.endswith("runs,head_distance_by_head,nmi_by_head,head_distance_by_decoder_head,nmi_by_decoder_head")
    assert {column: cell for column, cell in random.items() if cell} == {
        "table": "8",
        "row": "random",
        "name": "Random | 35 %",
        "seeds": "0",
        "paper_ap_box": "49.2",
        "paper_ap_mask": "43.3",
    }
    assert list(random) == list(none)


def test_a_decoder_has_curves_of_its_own():
    decoder = AttentionCurves(((10.0, 12.0), (11.0, 13.0)), ((0.25, 0.35), (0.4, 0.4)))
    figure = TABLE._replace(key="fig3")
    results = [result("none", measures(90)), result("random", measures(80, decoder=decoder))]
    lines = render_markdown(Report(figure, results, 1, "command")).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if "its decoder" in line]
    assert [row[1:] for row in rows] == [
        *(["11.0", "12.0", "-"], ["1.0", "1.0", "-"]),
        *(["0.30", "0.40", "-"], ["0.05", "0.00", "-"]),
    ]
    first, second = csv.DictReader(io.StringIO(render_csv(Report(figure, results, 1, "command"))))
    assert first["head_distance_by_decoder_layer"] == ""
    assert second["head_distance_by_decoder_layer"] == "11 12"
    assert second["nmi_by_decoder_layer"] == "0.3 0.4"
    assert second["head_distance_by_layer"] == "16 17 15"
    assert first["nmi_by_decoder_head"] == ""
    assert second["head_distance_by_decoder_head"] == "10 12; 11 13"
    assert second["nmi_by_decoder_head"] == "0.25 0.35; 0.4 0.4"
