"""What reports say of their rows: those of one name, and which model is the best."""

import pytest

from anodiff.evaluation import page
from anodiff.evaluation.sections import choose_best, comparison_section


def row(name, kind="pipeline", **metrics):
    return {"name": name, "kind": kind, "metrics": metrics}


def compared(metric, rows, pairs):
    """The report of rows with the comparisons of some pairs, whose differences are those of the metric."""
    comparisons = []
    for first, second in pairs:
        difference = rows[first]["metrics"][metric] - rows[second]["metrics"][metric]
        ends = {"difference": difference, "low": difference - 0.1, "high": difference + 0.1}
        names = {"first": rows[first]["name"], "second": rows[second]["name"], "rows": [first, second]}
        comparisons.append({"metric": metric, **names, **ends, "p": 0.001, "p_holm": 0.002})
    return {"results": rows, "comparisons": comparisons}


def cells(report):
    return [line.split(" | ")[:2] for line in comparison_section(report) if line.startswith("| ")][1:]


def test_rows_of_one_name_are_all_compared():
    rows = [row("B (run)", voxel_average_precision=value) for value in (0.5, 0.8, 0.2)]
    rows.append(row("intensity", "baseline", voxel_average_precision=0.9))
    report = compared("voxel_average_precision", rows, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)])
    # The second model less each of the others, though it has their name.
    texts = [(name.removeprefix("| "), text.split()[0]) for name, text in cells(report)]
    assert texts == [("B (run)", "+0.300"), ("B (run)", "+0.600"), ("intensity", "-0.100")]


@pytest.mark.parametrize("key", ["froc", "sweep", "reliability"])
def test_rows_of_one_name_all_have_their_curve(key):
    curve = {"false_positives": [0.1, 1.0], "recall": [0.2, 0.5], "thresholds": [0.1, 0.2], "dice": [0.3, 0.4]}
    curve |= {"all": {"predicted": [0.1, 0.9], "observed": [0.2, 0.7]}}
    rows = [row("A (run)") | {key: curve}, row("A (run)") | {key: curve}]
    (figure,) = [one for one in page._draw_curves(rows) if one is not None]
    assert figure.svg.count(">A (run)<") == 2


@pytest.mark.parametrize(
    ("metric", "values", "others"),
    [
        ("voxel_average_precision", (0.5, 0.9, 0.7), {"slice_auroc": 0.5}),
        ("slice_auroc", (0.55, 0.95, 0.7), {"voxel_average_precision": None}),  # without masks
        ("ged", (0.7, 0.2, 0.5), {}),
        # No model is better for a value of something else.
        ("voxel_average_precision", (0.0, 0.1, 0.05), {"slice_auroc": 0.5}),
    ],
)
def test_the_best_model_is_that_of_the_page(metric, values, others):
    rows = [row(name, **others | {metric: value}) for name, value in zip("ABC", values, strict=True)]
    rows.append(row("intensity", "baseline", **others | {metric: 1.0}))
    text = "\n".join(comparison_section(compared(metric, rows, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])))
    assert choose_best(rows) == 1 and page.choose_best is choose_best
    assert "Differences B less the other" in text
