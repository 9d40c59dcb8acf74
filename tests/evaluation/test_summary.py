import json

import pytest

from hdscale.analysis.curves import AttentionCurves
from hdscale.evaluation.accuracy import Accuracy
from hdscale.evaluation.measure import SummaryRow
from hdscale.evaluation.summary import curve_scalars, render_knn, render_summary, student_differences, summary_json

CURVES = AttentionCurves((1.0, 2.0, 3.0, 4.0, 5.0, 6.25), (0.0, 0.1, 0.2, 0.3, 0.4, 0.55))


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
        "model                      k-NN %  head distance px, last 4 layers   NMI, last 4 layers  images/s",
        "--------------------  -----------  -------------------------------  -------------------  --------",
        "raw pixels            90.0 +- 1.0                                -                    -         -",
        "student feature_only  95.0 +- 1.1            3.0   4.0   5.0   6.2  0.20 0.30 0.40 0.55       812",
        "student hybrid        97.0 +- 0.9            3.0   4.0   5.0   6.2  0.20 0.30 0.40 0.55         -",
        "",
        "k-NN: k = 5, 360 held-out samples, accuracy +- its standard error",
        "student hybrid against student feature_only: +2.0 points, standard error 1.4: no difference",
    ]


def test_a_clear_difference_is_not_called_none():
    rows = [make_row("a", "student", 0.9), make_row("b", "student", 0.5)]
    assert render_summary(rows, neighbors=5).splitlines()[-1] == "b against a: -40.0 points, standard error 1.4"


def test_a_shallow_student_shows_the_layers_it_has():
    shallow = AttentionCurves((1.0, 2.0), (0.1, 0.2))
    text = render_summary([make_row("a", "student", 0.9, curves=shallow)], neighbors=5)
    assert "NMI, last 2 layers" in text
    assert "  1.0   2.0  " in text


def test_the_json_file_holds_all_layers():
    rows = [make_row("raw", "baseline", 0.9, curves=None), make_row("a", "student", 0.9), make_row("b", "student", 0.5)]
    content = json.loads(json.dumps(summary_json(rows)))
    assert content["rows"][0]["nmi"] is None
    assert content["rows"][1]["head_distance"] == list(CURVES.head_distance)
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


def test_tensorboard_gets_one_value_a_layer_and_model():
    shallow = make_row("student b", "student", 0.9, curves=AttentionCurves((7.0,), (0.7,)))
    layers = curve_scalars([make_row("raw", "baseline", 0.9, curves=None), make_row("a", "teacher", 0.9), shallow])
    assert len(layers) == 6
    assert layers[0] == {
        "head_distance_by_layer/a": 1.0,
        "nmi_by_layer/a": 0.0,
        "head_distance_by_layer/student_b": 7.0,
        "nmi_by_layer/student_b": 0.7,
    }
    assert layers[5] == {"head_distance_by_layer/a": 6.25, "nmi_by_layer/a": 0.55}


def test_a_single_result_is_one_line():
    assert render_knn(Accuracy(0.9639, 0.0098, 360), 5, 1437) == (
        "k-NN accuracy 96.4 +- 1.0 % (k = 5, 360 held-out samples, 1437 training samples)"
    )
