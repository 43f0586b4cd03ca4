"""The evaluation program on pictures and on volumes, with ANDi: numbers of the draws, times, labels, protocols, what a report holds."""

import functools
import json
import types

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import ANDiPipeline, ANDiScheduler, AnomalyPipeline, VolumeProcessor
from anodiff.data.prepare import prepare
from anodiff.data.prepared import PreparedSplit, load_prepared
from anodiff.data.readers.subjects import Subject
from anodiff.data.rules import SliceRule
from anodiff.evaluation import run
from anodiff.evaluation.calibration import LabelledSlices
from anodiff.evaluation.cases import Case, slice_numbers
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import PROTOCOLS, pooled
from anodiff.evaluation.run import evaluate
from anodiff.hub.model_card import PROTOCOL_FIELDS
from anodiff.schedulers.draws import DRAWS_VERSION


SIZE = 16
PICTURES = 8
SLICES = 5
TIMESTEPS = 3


def save_model(folder):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = ANDiPipeline(unet, ANDiScheduler(50), make_processor(), start=2, stop=2 + TIMESTEPS, median_size=3)
    pipe.save_pretrained(folder)
    return str(folder)


def make_processor():
    return VolumeProcessor(
        modalities=("image",), size=(SIZE, SIZE), intensity="given", value_range=(-1, 1), brain_mask="none"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sets `pictures`, all the same picture, and `volumes`, with lesions in some slices, and a checkpoint `model`."""
    folder = tmp_path_factory.mktemp("evaluation")
    random = np.random.default_rng(0)
    picture = random.integers(50, 200, (SIZE, SIZE)).astype(np.uint8)
    pictures, volumes = [], []
    for split in ("validation", "test"):
        for number in range(PICTURES):
            path = folder / f"{split}{number}.png"
            PIL.Image.fromarray(picture).save(path)
            pictures.append(Subject(path.stem, {"image": path}, label=number % 2, split=split))
        for number in range(2):
            files = {name: folder / f"{split}{number}_{name}.nii.gz" for name in ("image", "mask")}
            mask = np.zeros((SIZE, SIZE, SLICES), np.uint8)
            mask[4:9, 5:10, 1 + number :: 2] = 1
            image = random.uniform(0.2, 0.6, mask.shape).astype(np.float32) + 0.4 * mask
            for name, array in (("image", image), ("mask", mask)):
                nib.save(nib.Nifti1Image(array, np.eye(4)), files[name])
            volumes.append(Subject(f"{split}{number}", {"image": files["image"]}, (files["mask"],), split=split))
    for name, subjects in (("pictures", pictures), ("volumes", volumes)):
        rule = SliceRule(min_brain=0.0)
        prepare(subjects, make_processor(), folder / name, recipe={}, slices=rule, progress=False)
    save_model(folder / "model")
    return folder


def options(place, data, out, **others):
    return EvalOptions(model=[str(place / "model")], data=str(place / data), output_dir=str(place / out), **others)


def load_cases(folder):
    return [Case.load(path) for path in sorted(folder.glob("*.npz"))]


def test_every_picture_has_noise_of_its_own(place):
    split = load_prepared(place / "pictures", "test")
    numbers = [int(slice_numbers(split, name, split.slices[split.subject_rows(name)])[0]) for name in split.subjects]
    assert split.slices.tolist() == [0] * PICTURES and numbers == list(range(PICTURES))
    # Calibration has the same numbers.
    assert [item["slice"].tolist() for item in LabelledSlices(split)] == [[number] for number in numbers]

    report = evaluate(options(place, "pictures", "out-pictures", keep_maps=True, batch_size=3))
    # One picture, eight maps: each as in a call with all of them.
    cases = load_cases(place / "out-pictures" / "maps" / "00" / "test")
    assert len({case.maps.tobytes() for case in cases}) == PICTURES
    pipe = AnomalyPipeline.from_pretrained(place / "model")
    pipe.set_progress_bar_config(disable=True)
    images = torch.from_numpy(np.concatenate([split.read_subject(name)["image"] for name in split.subjects]))
    brain = torch.ones(PICTURES, SIZE, SIZE, dtype=torch.bool)
    expected = pipe.map_slices(images, brain, range(PICTURES), volumes=[1] * PICTURES).maps.numpy()
    for case, maps in zip(cases, expected, strict=True):
        np.testing.assert_allclose(case.maps[0], maps, rtol=0, atol=1e-5 * expected.max())
    assert report["results"][0]["metrics"]["dice_oracle"] is None  # there are no masks


@pytest.fixture(scope="module")
def volumes_report(place):
    return evaluate(options(place, "volumes", "out-volumes", keep_maps=True))


def test_slices_of_a_volume_are_numbered_as_in_a_call(place, volumes_report):
    pipe = AnomalyPipeline.from_pretrained(place / "model")
    pipe.set_progress_bar_config(disable=True)
    cases = load_cases(place / "out-volumes" / "maps" / "00" / "test")
    assert len(cases) == 2
    for case in cases:
        called = pipe(nib.load(place / f"{case.subject}_image.nii.gz"))
        images = pipe.processor.preprocess(nib.load(place / f"{case.subject}_image.nii.gz")).slices
        expected = pipe(images).anomaly_map.numpy()
        np.testing.assert_allclose(case.maps, expected, rtol=0, atol=1e-5 * expected.max())
        assert called.volume_score == pytest.approx(case.volume_score, rel=1e-4)


def test_report(place, volumes_report):
    assert volumes_report["draws"] == DRAWS_VERSION and "task" not in volumes_report
    assert set(volumes_report["protocol"]) == set(PROTOCOL_FIELDS) and all(volumes_report["protocol"].values())
    assert "healthy: 0.05 of the voxels" in volumes_report["protocol"]["threshold_policy"]
    row = volumes_report["results"][0]
    for name in ("dice", "volume_dice", "lesion_f1"):
        assert all(0 <= row["metrics"][f"{name}_{policy}"] <= 1 for policy in ("oracle", "validation", "yen"))
    assert f"draws {DRAWS_VERSION}" in (place / "out-volumes" / "report.md").read_text()


def test_seconds_per_slice(place, monkeypatch):
    """From slices to filtered maps: what a network and a filter take, nothing of what reading, saving and scoring take."""
    clock = [0.0]

    def taking(seconds, owner, name):
        function = getattr(owner, name)

        def slow(*arguments, **named):
            clock[0] += seconds
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(run, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    taking(2.0, UNet2DModel, "forward")
    taking(10.0, AnomalyPipeline, "filter_maps")
    for owner, name in ((PreparedSplit, "read_subject"), (Case, "save"), (pooled, "score")):
        taking(1000.0, owner, name)
    report = evaluate(options(place, "volumes", "out-seconds", batch_size=1, baselines=False))
    # Each subject is a batch of its own: SLICES slices of TIMESTEPS evaluations, and one filter.
    assert clock[0] > 1000
    assert report["results"][0]["seconds_per_slice"] == pytest.approx(TIMESTEPS * 2.0 + 10.0 / SLICES)


def test_seconds_of_several_processes_are_added_up(place, monkeypatch):
    monkeypatch.setattr(run, "gather_object", lambda own: [(3.0, 10), (1.0, 20), (2.0, 10)])
    report = evaluate(options(place, "volumes", "out-processes", baselines=False))
    assert report["results"][0]["seconds_per_slice"] == pytest.approx(6 / 40)


def test_a_map_that_is_not_finite_is_named(place, monkeypatch):
    compute_maps = ANDiPipeline.compute_maps

    @functools.wraps(compute_maps)
    def damaged(*arguments, **named):
        results = compute_maps(*arguments, **named)
        return results._replace(maps=results.maps * float("nan"))

    monkeypatch.setattr(ANDiPipeline, "compute_maps", damaged)
    with pytest.raises(ValueError, match=r"model, test, subject\(s\) test0, test1: The network gave NaN"):
        evaluate(options(place, "volumes", "out-nan", baselines=False))


def test_unknown_labels_are_not_healthy(tmp_path):
    """Slices that nobody has looked at take part in no threshold and no AUROC, and make no subject healthy."""
    random = np.random.default_rng(0)
    files = {"validation": [], "test": []}
    labels = {"healthy": [0, 0], "partly": [0, -1], "unknown": [-1, -1], "ill": [1, -1]}
    for split, paths in files.items():
        for name, values in labels.items():
            maps = random.uniform(0, 1, (2, 8, 8)).astype(np.float32)
            maps[np.array(values) == -1] += 10
            brain = np.ones(maps.shape, bool)
            case = Case(name, maps, brain, None, np.array(values), maps.mean((1, 2)), float(maps.mean()))
            case.save(tmp_path / split)
            paths.append(tmp_path / split / f"{name}.npz")
    row = {"name": "any", "settings": {"min_component_size": 0}}
    metrics, records, _ = pooled.score(row, files, None, EvalOptions(healthy_fpr=0.0))
    assert {record["subject"]: record["label"] for record in records} == {
        "healthy": 0,
        "partly": -1,
        "unknown": -1,
        "ill": 1,
    }
    assert metrics["threshold_healthy"] < 1
    assert metrics["subject_auroc"] == 1.0  # the healthy one against the ill one
    assert 0 <= metrics["slice_auroc"] <= 1
    statistic = pooled.score_statistic((np.array([1.0, 2.0, 9.0]), np.array([0, 1, -1])), None)
    assert statistic["slice_auroc"] == 1.0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_contract_of_the_protocols(name):
    protocol = PROTOCOLS[name]
    assert set(protocol.TEXT) <= set(PROTOCOL_FIELDS) and all(protocol.COLUMNS.values())
    assert protocol.TASK in run.KINDS and (protocol.SWEEP is None or len(protocol.SWEEP) in (0, 3))
    own = run.KINDS[protocol.TASK].OWN_PROTOCOL
    assert protocol is own or not set(protocol.COLUMNS) & set(own.COLUMNS)


@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if protocol.TASK == pooled.TASK])
def test_protocols_score_the_same_maps(place, volumes_report, name):
    report = evaluate(options(place, "volumes", f"out-{name}", protocol=name))
    columns = PROTOCOLS[name].COLUMNS
    own = [row for row in report["results"] if row["kind"] == "pipeline"]
    theirs = [row for row in volumes_report["results"] if row["kind"] == "pipeline"]
    for one, other in zip(own, theirs, strict=True):
        assert {key: one["metrics"][key] for key in other["metrics"]} == other["metrics"]
        # Of a method that reconstructs nothing and has no masks of its own, what needs them is not there.
        measured = {column for column in columns if one["metrics"].get(column) is not None}
        assert measured, name
    text = (place / f"out-{name}" / "report.md").read_text()
    assert all(title in text for column, title in columns.items() if column in own[0]["metrics"])
    assert json.loads((place / f"out-{name}" / "report.json").read_text()) == report
    assert (place / f"out-{name}" / "cases.png").stat().st_size > 10_000 and not (
        place / f"out-{name}" / "maps"
    ).exists()
