import json

import pytest

from hdscale.analysis.curves import AttentionCurves
from hdscale.evaluation.accuracy import Accuracy
from hdscale.evaluation.measure import SummaryRow
from hdscale.evaluation.summary import curve_scalars, render_knn, render_summary, student_differences, summary_json

# Two heads around each layer's mean, as far from it as the second list says, which is their deviation.
MEANS = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.25], [0.0, 0.1, 0.2, 0.3, 0.4, 0.55])
DEVIATIONS = ([0.0, 0.5, 1.0, 0.25, 2.5, 3.75], [0.0, 0.05, 0.1, 0.15, 0.2, 0.25])


def around(means, deviations):
    return tuple((mean - deviation, mean + deviation) for mean, deviation in zip(means, deviations, strict=True))


CURVES = AttentionCurves(*map(around, MEANS, DEVIATIONS))


def make_row(name, role, accuracy, error=0.01, curves=CURVES, rate=None):
    return SummaryRow(name, role, Accuracy(accuracy, error, 360), curves, rate)


def test_differences_below_twice_their_standard_error_are_none():
    rows = [
        make_row("teacher", "teacher", 0.2),
        make_row("a", "student", 0.9, 0.03),
        make_row("b", "student", 0.999, 0.04),
        make_row("c", "student", 1.0, 0.0),
    ]
    differences = student_differences(rows)
    assert list(differences) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert [d.standard_error for d in differences.values()] == pytest.approx([0.05, 0.03, 0.04])
    assert [d.value for d in differences.values()] == pytest.approx([0.099, 0.1, 0.001])
    assert [d.is_clear for d in differences.values()] == [False, True, False]


def test_equal_students_without_any_error_are_no_difference():
    differences = student_differences([make_row("a", "student", 1.0, 0.0), make_row("b", "student", 1.0, 0.0)])
    assert [difference.is_clear for difference in differences.values()] == [False]


def test_the_table_is_aligned_and_says_what_is_no_difference():
    rows = [
        make_row("raw pixels", "baseline", 0.9, curves=None),
        make_row("student feature_only", "student", 0.95, 0.011, rate=812.4),
        make_row("student hybrid", "student", 0.97, 0.009),
    ]
    assert render_summary(rows, neighbors=5).splitlines() == [
        "model                      k-NN %   head distance px   sd over heads             NMI  images/s",
        "--------------------  -----------  -----------------  --------------  --------------  --------",
        "raw pixels            90.0 +- 1.0                  -               -               -         -",
        "student feature_only  95.0 +- 1.1    4.0   5.0   6.2   0.2  2.5  3.8  0.30 0.40 0.55       812",
        "student hybrid        97.0 +- 0.9    4.0   5.0   6.2   0.2  2.5  3.8  0.30 0.40 0.55         -",
        "",
        "last 3 layers: head distance and NMI are means over heads, sd is the head distance's deviation",
        "k-NN: k = 5, 360 held-out samples, accuracy +- its standard error",
        "student hybrid against student feature_only: +2.0 points, standard error 1.4: no difference",
    ]


def test_a_clear_difference_is_not_called_none():
    rows = [make_row("a", "student", 0.9), make_row("b", "student", 0.5)]
    assert render_summary(rows, neighbors=5).splitlines()[-1] == "b against a: -40.0 points, standard error 1.4"


def test_a_shallow_student_shows_the_layers_it_has():
    shallow = AttentionCurves(((1.0,), (2.0,)), ((0.1,), (0.2,)))
    text = render_summary([make_row("a", "student", 0.9, curves=shallow)], neighbors=5)
    assert "last 2 layers: head distance and NMI are means" in text
    assert "  1.0   2.0  " in text


def test_heads_that_collapsed_are_seen_beside_heads_that_differ_around_the_same_mean():
    local_and_global = ((26.0, 111.0, 108.0, 109.0, 105.0, 81.0),)
    alike = ((75.0, 105.0, 90.0, 90.0, 90.0, 90.0),)
    nmi = ((0.1,) * 6,)
    rows = [
        make_row(name, "student", 0.9, curves=AttentionCurves(heads, nmi))
        for name, heads in (("spread", local_and_global), ("collapsed", alike))
    ]
    cells = {line.split()[0]: line.split()[4:] for line in render_summary(rows, neighbors=5).splitlines()[2:4]}
    # Means, which say nothing, and deviations: sqrt of 5528 / 6 and of 450 / 6.
    assert cells == {"spread": ["90.0", "30.4", "0.10", "-"], "collapsed": ["90.0", "8.7", "0.10", "-"]}


def test_the_json_file_holds_all_layers_and_heads():
    rows = [make_row("raw", "baseline", 0.9, curves=None), make_row("a", "student", 0.9), make_row("b", "student", 0.5)]
    content = json.loads(json.dumps(summary_json(rows)))
    figures = ["head_distance", "nmi", "head_distance_by_head", "nmi_by_head"]
    assert [content["rows"][0][figure] for figure in figures] == [None] * 4
    assert content["rows"][1]["head_distance"] == MEANS[0]
    assert content["rows"][1]["nmi"] == pytest.approx(MEANS[1])
    assert content["rows"][1]["head_distance_by_head"] == [list(heads) for heads in CURVES.head_distance]
    assert content["rows"][1]["nmi_by_head"] == [list(heads) for heads in CURVES.nmi]
    assert content["rows"][1]["knn"] == {"accuracy": 0.9, "standard_error": 0.01, "num": 360}
    assert content["differences"] == [
        {
            "first": "b",
            "second": "a",
            "accuracy": pytest.approx(-0.4),
            "standard_error": pytest.approx(0.01 * 2**0.5),
            "is_clear": True,
        }
    ]


def test_tensorboard_gets_mean_and_deviation_per_layer_and_model():
    shallow = make_row("student b", "student", 0.9, curves=AttentionCurves(((6.0, 8.0),), ((0.7, 0.7),)))
    layers = curve_scalars([make_row("raw", "baseline", 0.9, curves=None), make_row("a", "teacher", 0.9), shallow])
    assert len(layers) == 6
    assert layers[0] == {
        "head_distance_by_layer/a": 1.0,
        "head_distance_sd_over_heads_by_layer/a": 0.0,
        "nmi_by_layer/a": 0.0,
        "nmi_sd_over_heads_by_layer/a": 0.0,
        "head_distance_by_layer/student_b": 7.0,
        "head_distance_sd_over_heads_by_layer/student_b": 1.0,
        "nmi_by_layer/student_b": 0.7,
        "nmi_sd_over_heads_by_layer/student_b": 0.0,
    }
    assert layers[5] == pytest.approx(
        {
            "head_distance_by_layer/a": 6.25,
            "head_distance_sd_over_heads_by_layer/a": 3.75,
            "nmi_by_layer/a": 0.55,
            "nmi_sd_over_heads_by_layer/a": 0.25,
        }
    )


def test_a_single_result_is_one_line():
    assert render_knn(Accuracy(0.9639, 0.0098, 360), 5, 1437) == (
        "k-NN accuracy 96.4 +- 1.0 % (k = 5, 360 held-out samples, 1437 training samples)"
    )
