"""Paired comparisons of methods on the same subjects."""

from __future__ import annotations

import numpy as np

from .metrics import percentiles


def compare(rows: list[dict], resamples: list[dict[str, np.ndarray]], groups: dict[str, int]) -> list[dict]:
    """
    Returns the comparisons of every pipeline with every other row, each pair once, as `comparisons` of a report holds
    them: `metric`, names `first` and `second` and their numbers `rows` in the results, the `difference` first less
    second with the ends `low` and `high` of its 95 % interval, `p` and `p_holm`.

    Both methods are scored on the same resamples of the groups, so that what makes subjects hard for both cancels out.
    `p` is the two-sided p-value of the same resamples, twice the smaller share of those in which the difference is at
    most, or at least, 0 (counting the data themselves as one), so that it agrees with the interval. Unlike a test that
    exchanges the methods in subjects it fits pooled metrics, whose scores have a unit of their own in each method. It
    is never below 2^(1-n) of n groups: so often n differences have one sign by chance, and with fewer than six nothing
    is significant. `p_holm` is corrected (Holm) for all comparisons of the metric. Without a resample in which both
    are defined there is no comparison, nor between ensembles of different numbers of samples.

    Args:
        rows: Of the report, with `name`, `kind` and `metrics`.
        resamples: Of each row, metric to its value in each resample.
        groups: Of each metric, how many groups it has values of.
    """
    comparisons = []
    for metric in dict.fromkeys(metric for one in resamples for metric in one):
        pairs = [
            (first, second)
            for first, row in enumerate(rows)
            if row["kind"] == "pipeline"
            for second in range(len(rows))
            if (second > first or rows[second]["kind"] != "pipeline")
            and metric in resamples[first].keys() & resamples[second]
            # Metrics of ensembles depend on the number of samples.
            and rows[first]["metrics"].get("num_samples") == rows[second]["metrics"].get("num_samples")
        ]
        found = []
        for first, second in pairs:
            values = [rows[number]["metrics"].get(metric) for number in (first, second)]
            differences = resamples[first][metric] - resamples[second][metric]
            differences = differences[np.isfinite(differences)]
            if None in values or not differences.size:
                continue
            low, high = percentiles(differences)
            tail = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
            p = min(1.0, max(2 * (tail + 1) / (differences.size + 1), 2.0 ** (1 - groups[metric])))
            names = {"metric": metric, "first": rows[first]["name"], "second": rows[second]["name"]}
            ends = {"difference": values[0] - values[1], "low": low, "high": high}
            found.append({**names, "rows": [first, second], **ends, "p": p})
        for comparison, corrected in zip(found, holm([one["p"] for one in found]), strict=True):
            comparisons.append({**comparison, "p_holm": corrected})
    return comparisons


def holm(p_values: list[float]) -> list[float]:
    """Returns p-values that are corrected for their number by Holm's step-down method: the k-th smallest of n times
    n - k + 1, at least the one before it, at most 1."""
    corrected, last = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        last = min(1.0, max(last, (len(p_values) - rank) * p_values[index]))
        corrected[index] = last
    return corrected
