"""Paired comparisons of methods, and scores of groups of the subjects."""

import types

import numpy as np
import pytest

from anodiff.evaluation.cases import Case
from anodiff.evaluation.comparisons import compare, holm
from anodiff.evaluation.metrics import NUM_RESAMPLES, average_precision, dice, resample_mean
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import pooled
from anodiff.evaluation.strata import FEW, check_strata, divide, score_strata

from .test_lesions import make_case


def test_holm():
    # 0.01 times 4; 0.02 times 3; 0.03 times 2, but at least the one before; 0.9 times 1.
    assert holm([0.9, 0.01, 0.03, 0.02]) == pytest.approx([0.9, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def rows_of(*means):
    kinds = ("pipeline", "pipeline", "baseline", "baseline")
    return [
        {"name": f"row {number}", "kind": kind, "metrics": {"dice": float(np.mean(values))}}
        for number, (kind, values) in enumerate(zip(kinds, means, strict=False))
    ]


def test_every_pair_with_a_model_is_compared_once():
    values = [np.arange(8) / 8, np.arange(8) / 8 + 0.01, np.zeros(8), np.ones(8)]
    resamples = [{"dice": resample_mean(one)} for one in values]
    found = compare(rows_of(*values), resamples, {"dice": 8})
    assert [one["rows"] for one in found] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    # Their intervals overlap nearly wholly, and yet each subject is better by 0.01.
    first = found[0]
    assert [first[name] for name in ("difference", "low", "high")] == pytest.approx([-0.01] * 3)
    # Eight subjects of one sign: 2 * (1/2)^8, more than 2/2001 of the resamples; the smallest of five.
    assert first["p"] == 2.0**-7 and first["p_holm"] == 5 * 2.0**-7
    assert (first["metric"], first["first"], first["second"]) == ("dice", "row 0", "row 1")


def test_ensembles_of_other_numbers_of_samples_are_not_compared():
    values = [np.arange(8) / 8, np.arange(8) / 8 + 0.01, np.zeros(8)]
    rows = rows_of(*values)
    for row, samples in zip(rows, (8, 16, 8), strict=True):
        row["metrics"]["num_samples"] = samples
    found = compare(rows, [{"dice": resample_mean(one)} for one in values], {"dice": 8})
    assert [one["rows"] for one in found] == [[0, 2]]


def test_the_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(0)
    sure = 0
    for shift in np.linspace(0, 0.6, 60):
        values = rng.normal(size=(2, 20))
        values[0] += shift
        resamples = [{"dice": resample_mean(one)} for one in values]
        (found,) = compare(rows_of(*values), resamples, {"dice": 20})
        outside = not found["low"] <= 0 <= found["high"]
        sure += outside
        assert outside == (found["p"] < 0.05) or found["p"] == pytest.approx(0.05, abs=0.002)
        assert found["low"] <= found["difference"] <= found["high"]
    assert 5 < sure < 55


def test_methods_that_do_not_differ_are_rarely_significant():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        values = rng.normal(size=(2, 15))
        found += compare(rows_of(*values), [{"dice": resample_mean(one)} for one in values], {"dice": 15})
    # The percentile bootstrap is a little narrow at 15 subjects: 5 % become about 7 %.
    assert 0.02 < np.mean([one["p"] < 0.05 for one in found]) < 0.11


def test_nothing_is_compared_without_groups_or_values():
    alone = [{"dice": resample_mean(np.array([value]))} for value in (0.1, 0.9)]
    assert compare(rows_of([0.1], [0.9]), alone, {"dice": 1}) == []
    # What one of both does not have.
    several = [{"dice": np.zeros(NUM_RESAMPLES)}, {"other": np.zeros(NUM_RESAMPLES)}]
    assert compare(rows_of([0.1], [0.9]), several, {"dice": 5}) == []
    # Equal methods: no difference in any resample.
    (same,) = compare(rows_of([0.5], [0.5]), [{"dice": np.full(NUM_RESAMPLES, 0.5)}] * 2, {"dice": 9})
    assert same["p"] == 1.0 and same["difference"] == same["low"] == same["high"] == 0


def score_scans(folder, kinds, good):
    """The row and the tally of a method whose maps fit more (`good`) or less to scans with a mask (m), with labels
    alone (l), of unknown label (u), and healthy ones without a mask (h)."""
    rng, files = np.random.default_rng(1), []
    for number, kind in enumerate(kinds):
        mask = np.zeros((2, 8, 8), bool)
        mask[1, 2:5, 2:5] = True
        maps = (rng.random(mask.shape) + mask * (0.8 if good else 0.1)).astype(np.float32)
        labels = {"h": [0, 0], "u": [-1, -1]}.get(kind, [0, 1])
        case = Case(
            f"scan {number}",
            maps,
            np.ones_like(mask),
            mask if kind == "m" else None,
            np.array(labels),
            np.array([0.0, 1.0]) if good else rng.random(2),
            1.0,
        )
        case.save(folder / str(good))
        files.append(folder / str(good) / f"scan {number}.npz")
    row = {"name": str(good), "kind": "pipeline", "settings": {"min_component_size": 0}}
    metrics, *_, tally = pooled.score(row, {"test": files}, None, EvalOptions())
    return row | {"metrics": metrics}, tally


@pytest.mark.parametrize(
    ("kinds", "with_mask", "labelled"),
    [("l" * 20, 0, 20), ("m" * 3 + "h" * 20, 3, 23), ("m" * 8 + "u" * 20, 8, 8), ("l" * 3 + "u" * 20, 0, 3)],
)
def test_a_metric_counts_the_groups_that_it_has_values_of(tmp_path, kinds, with_mask, labelled):
    """With few of them nothing is significant, however many others there are, and with many it may be."""
    rows, tallies = zip(*(score_scans(tmp_path, kinds, good) for good in (True, False)), strict=True)
    num_groups = tallies[0].num_groups
    assert num_groups["slice_auroc"] == labelled
    assert num_groups["voxel_average_precision"] == num_groups["dice_oracle"] == with_mask
    found = compare(rows, [tally.resamples for tally in tallies], num_groups)
    p_values = {one["metric"]: one["p"] for one in found}
    assert p_values["slice_auroc"] >= 2.0 ** (1 - labelled) and (p_values["slice_auroc"] < 0.05) == (labelled > 5)
    assert ("voxel_average_precision" in p_values) == (with_mask > 0)
    for metric in p_values.keys() - {"slice_auroc"}:
        assert p_values[metric] >= 2.0 ** (1 - with_mask)


class Split(types.SimpleNamespace):
    """What the division of subjects reads of a prepared split: three slices of 40 x 40, each subject its lesion."""

    def read_subject(self, subject):
        brain = np.zeros((3, 40, 40), bool)
        brain[:, 5:35, 5:35] = True
        side, intensity = self.lesions[subject]
        mask = np.zeros_like(brain)
        mask[:, 10 : 10 + side, 10 : 10 + side] = True
        image = np.where(np.arange(40) % 2, 0.4, 0.6) * brain  # mean 0.5, standard deviation 0.1
        image = np.where(mask, intensity, image)[:, None]
        return {
            "image": image,
            "brain": brain,
            "mask": mask[:, None][:, : int(side > 0)],
            "slice": np.array([0, 2, 4]),
        }


def make_split(affine=(2.0, 2.0, 2.5)):
    lesions = {"a": (2, 0.9), "b": (10, 0.1), "c": (20, 0.52), "d": (0, 0.0), "e": (3, 0.7)}
    info = {
        name: {
            "subject": name,
            "network_shape": [40, 40, 5],
            "network_affine": np.diag([*affine, 1.0]).ravel().tolist(),
            "age": age,
            "sex": sex,
            "affine": [1.0],
        }
        for name, age, sex in zip(lesions, (31.0, 45.0, 60.0, None, 72.0), "fmfmm", strict=True)
    }
    return Split(subjects=list(lesions), subject_info=info, lesions=lesions)


def test_subjects_are_divided():
    split = make_split()
    check_strata(["size", "contrast", "age", "sex"], split)
    divided = divide(split, ["size", "contrast", "age", "sex"])
    # Every second slice of 2.5 mm: a voxel has 2 x 2 x 5 mm = 0.02 ml; 3 * 4, 3 * 100, 3 * 400 and 3 * 9 voxels.
    assert divided["size"] == {"< 1 ml": ["a", "e"], "1 to 10 ml": ["b"], "> 10 ml": ["c"]}
    assert divided["contrast"] == {"darker": ["b"], "alike": ["c"], "brighter": ["a", "e"]}
    assert divided["age"] == {"31 to 45": ["a", "b"], "60": ["c"], "72": ["e"], "not known": ["d"]}
    assert divided["sex"] == {"f": ["a", "c"], "m": ["b", "d", "e"]}
    assert divide(split, []) == {}


def test_pictures_have_no_millilitres():
    split = make_split()
    split.subject_info["a"]["network_shape"] = [40, 40, 1]
    # 12, 27, 300 and 1200 pixels, in thirds.
    thirds = {"12 to 27 pixels": ["a", "e"], "300 pixels": ["b"], "1200 pixels": ["c"]}
    assert divide(split, ["size"]) == {"size": thirds}


def test_columns_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="`strata` must be of size, contrast, .*age, sex, got scanner"):
        check_strata(["age", "scanner"], make_split())
    with pytest.raises(ValueError, match="got affine"):
        check_strata(["affine"], make_split())


def test_scores_of_a_stratum_are_those_of_its_subjects_alone(tmp_path):
    rng = np.random.default_rng(0)
    files, cases = [], {}
    for name in "abcdef":
        mask = np.zeros((2, 6, 6), bool)
        mask[0, 1:4, 1:4] = True
        maps = (rng.integers(0, 50, mask.shape) + 20 * mask).astype(np.float32)
        cases[name] = (maps, mask)
        files.append(make_case(tmp_path, name, maps, mask, None))
    well = rng.integers(0, 50, (2, 6, 6)).astype(np.float32)
    files.append(make_case(tmp_path, "well", well, None, None))
    row = {"name": "any", "settings": {"min_component_size": 0}}
    metrics, *_, tally = pooled.score(row, {"test": files}, None, EvalOptions())
    divided = {"sex": {"f": ["a", "c", "well"], "m": ["b", "d", "e", "f"]}, "all": {"all": [*cases, "well"]}}
    scored = score_strata(tally, files, divided)
    women, men = scored["sex"]
    assert (women["stratum"], women["subjects"], women["few"]) == ("f", 3, True) and FEW == 5
    maps, masks = (np.concatenate(arrays) for arrays in zip(cases["a"], cases["c"], strict=True))
    assert women["metrics"]["voxel_average_precision"] == pytest.approx(average_precision(maps, masks), abs=1e-12)
    predicted = maps > metrics["threshold_oracle"]
    assert women["metrics"]["dice_oracle"] == pytest.approx(dice(predicted, masks))
    assert women["metrics"]["voxel_average_precision_low"] is not None and men["metrics"]["lesion_recall_oracle"] == 1
    everything = scored["all"][0]
    assert not everything["few"]
    for name, value in everything["metrics"].items():
        assert value == metrics[name], name
