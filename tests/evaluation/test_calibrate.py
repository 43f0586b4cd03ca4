"""Calibration without masks: what is read, what is chosen, where it is stored, and that `eval.py`'s evaluation uses it."""

import json
import shutil

import datasets
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
import torch
from diffusers import UNet2DModel

from anodiff import AnoFPDMPipeline, AnoFPDMScheduler, AnomalyPipeline, DDIBPipeline, VolumeProcessor
from anodiff.data.prepare import prepare
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.subjects import Subject
from anodiff.evaluation.calibration import LabelledSlices, calibrate
from anodiff.evaluation.cases import Case
from anodiff.evaluation.healthy import measure_healthy_maps
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.run import evaluate
from anodiff.evaluation.thresholds import otsu_threshold, threshold_for_fpr, yen_threshold
from anodiff.pipelines.running_maps import similarity_threshold

from .. import tiny


SIZE = 16
MODALITIES = ("flair", "t1")


def make_unet():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    ).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    return unet


def make_processor():
    return VolumeProcessor(modalities=MODALITIES, size=(SIZE, SIZE))


def make_pipeline(kind=AnoFPDMPipeline, **settings):
    values = {"forward_steps": 4, "median_size": 3, "min_component_size": 2, **settings}
    pipe = kind(make_unet(), AnoFPDMScheduler(50), make_processor(), **values)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set with lesions in every other slice, and one with the same images and labels, but masks of the other slices."""
    folder = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(0)
    subjects = []
    for split in ("validation", "test"):
        for number in range(2):
            mask = np.zeros((SIZE, SIZE, 6), np.uint8)
            mask[4:9, 5:10, ::2] = 1
            files = {}
            for name in (*MODALITIES, "mask"):
                array = mask
                if name != "mask":
                    array = random.uniform(0.2, 0.6, mask.shape).astype(np.float32) + 0.4 * mask
                    array[:2] = 0
                files[name] = folder / f"{split}{number}_{name}.nii.gz"
                nib.save(nib.Nifti1Image(array, np.eye(4)), files[name])
            masks = (files.pop("mask"),)
            subjects.append(Subject(f"{split}{number}", files, masks, split=split))
    prepare(subjects, make_processor(), folder / "set", recipe={}, progress=False)
    shutil.copytree(folder / "set", folder / "other-masks")
    for shard in (folder / "other-masks" / "data").glob("*.parquet"):
        rows = datasets.Dataset.from_parquet(str(shard), cache_dir=str(folder / "cache"))
        rows.map(lambda row: {"mask": 1 - np.asarray(row["mask"], np.uint8)}).to_parquet(str(shard))
    return folder


def test_masks_are_not_read(prepared):
    records = {}
    for name in ("set", "other-masks"):
        split = load_prepared(prepared / name, "validation")
        slices = LabelledSlices(split)
        assert all(set(item) == {"image", "brain", "label", "slice"} for item in slices)
        pipe = make_pipeline()
        records[name] = calibrate(pipe, slices, guidance_scales=(1.0, 3.0))
        for policy in ("healthy", "yen", "otsu"):
            records[name, policy] = calibrate(make_pipeline(DDIBPipeline), slices, policy)["values"]
    assert records["set"] == records["other-masks"]
    for policy in ("healthy", "yen", "otsu"):
        assert records["set", policy] == records["other-masks", policy]

    # Labels from those masks would change the result.
    other = load_prepared(prepared / "other-masks", "validation")
    from_masks = [
        {**item, "label": other.read_subject(subject)["mask"].mean((1, 2, 3)) > 0.97}
        for subject, item in zip(other.subjects, LabelledSlices(other), strict=True)
    ]
    assert not any(
        (item["label"] == own["label"]).all() for item, own in zip(from_masks, LabelledSlices(other), strict=True)
    )
    changed = calibrate(make_pipeline(), from_masks, guidance_scales=(1.0, 3.0))
    assert changed["values"] != records["set"]["values"]


def test_guidance_scale_is_that_of_the_highest_accuracy(prepared):
    slices = LabelledSlices(load_prepared(prepared / "set", "validation"))
    pipe = make_pipeline(guidance_scale=0.5, threshold=0.1)
    record = calibrate(pipe, slices, guidance_scales=(0.5, 2.0, 8.0))
    assert [candidate["guidance_scale"] for candidate in record["candidates"]] == [0.5, 2.0, 8.0]
    best = max(candidate["image_accuracy"] for candidate in record["candidates"])
    equal = [candidate for candidate in record["candidates"] if candidate["image_accuracy"] == best]
    chosen = max(equal, key=lambda candidate: candidate["mean_gap"])
    assert pipe.config.guidance_scale == chosen["guidance_scale"]
    assert pipe.config.similarity_threshold == chosen["similarity_threshold"]
    assert list(pipe.config.gap_scale) == chosen["gap_scale"] and len(chosen["gap_scale"]) == 2
    assert pipe.config.threshold is None
    assert record["slices"] == 12 and record["anomalous_slices"] == 6

    # The accuracy is that of the labels the pipeline then gives, but for healthy slices at the threshold itself.
    right, ties = 0, 0
    for item in slices:
        values = pipe.compute_maps(
            torch.from_numpy(item["image"]), item["slice"].tolist(), seed=0, batch_size=4, **pipe.default_settings()
        )
        right += (values.details["label"].numpy() == item["label"]).sum()
        ties += (values.details["similarity"].numpy() == np.float32(chosen["similarity_threshold"])).sum()
    assert ties == 0 and right / 12 == pytest.approx(record["image_accuracy"])


def test_thresholds_of_other_methods(prepared):
    split = load_prepared(prepared / "set", "validation")
    slices = LabelledSlices(split)
    maps, brains, labels = [], [], []
    pipe = make_pipeline(DDIBPipeline)
    for item in slices:
        raw = pipe.compute_maps(
            torch.from_numpy(item["image"]), list(item["slice"]), batch_size=4, **pipe.default_settings()
        )
        maps.append(pipe.postprocessing.filter(raw.maps.numpy(), item["brain"]))
        brains.append(item["brain"])
        labels.append(item["label"])
    maps, brains, healthy = np.concatenate(maps), np.concatenate(brains), np.concatenate(labels) == 0
    expected = {
        "healthy": threshold_for_fpr(maps[healthy][brains[healthy]], 0.1),
        "yen": yen_threshold(maps[brains]),
        "otsu": otsu_threshold(maps[brains]),
    }
    assert len(set(expected.values())) == 3
    for policy, threshold in expected.items():
        record = calibrate(pipe, slices, policy, healthy_fpr=0.1, batch_size=3)
        assert record["values"]["threshold"] == pytest.approx(threshold, rel=1e-4), policy
        assert pipe.config.threshold == record["values"]["threshold"]


def test_thresholds_are_of_weighted_maps(prepared):
    split = load_prepared(prepared / "set", "validation")
    pipe = make_pipeline(DDIBPipeline, sign="brighter", weighting="intensity")
    maps = []
    for subject in split.subjects:
        item = split.read_subject(subject)
        images, brain = torch.from_numpy(item["image"]), torch.from_numpy(item["brain"])
        maps.append(pipe(images, brain_mask=brain).anomaly_map[brain].numpy())
    calibrate(pipe, LabelledSlices(split), "otsu")
    assert pipe.config.threshold == pytest.approx(otsu_threshold(np.concatenate(maps)), rel=1e-4)


def test_healthy_maps_are_the_mean_of_healthy_slices():
    """Levels are the two slices themselves: of two volumes, one of which has a lesion in the second."""
    pipe = make_pipeline(DDIBPipeline, median_size=0)
    images, brain = torch.rand(4, 2, SIZE, SIZE) * 2 - 1, torch.ones(4, SIZE, SIZE, dtype=torch.bool)
    brain[:, 0] = False
    maps = pipe.map_slices(images, brain, [0, 1, 0, 1], volumes=[2, 2]).maps.double()
    items = [
        {"image": images[rows].numpy(), "brain": brain[rows].numpy(), "label": np.array(label), "slice": np.arange(2)}
        for rows, label in ((slice(0, 2), [0, 0]), (slice(2, 4), [0, 1]))
    ]
    component = measure_healthy_maps(pipe, items, depth=2, smoothing=0.0, floor=1e-6)
    assert pipe.healthy_maps is component and pipe.config.normalization == "none"
    # One level along the slice axis: at the border the Gaussian of two levels has these weights.
    near = scipy.ndimage.gaussian_filter1d(np.eye(2), 1.0, axis=0)
    total = np.stack([(maps[0] + maps[2]).numpy(), maps[1].numpy()])
    count = np.stack([2 * brain[0].numpy(), brain[0].numpy()]).astype(float)
    mean = total.sum() / count.sum()
    smooth = [np.einsum("de,ehw->dhw", near, values) for values in (total, count)]
    expected = (smooth[0] / mean + 1) / (smooth[1] + 1)
    np.testing.assert_allclose(component.levels.numpy(), expected, rtol=1e-4)
    assert (component.levels[:, 0] == 1).all()  # no brain, no knowledge

    high = measure_healthy_maps(pipe, items, depth=2, smoothing=0.0, floor=0.9).levels
    torch.testing.assert_close(high, component.levels.clamp(min=0.9))
    pipe.register_to_config(normalization="healthy_maps")
    with pytest.raises(ValueError, match="`normalization` of the pipeline must be none"):
        measure_healthy_maps(pipe, items)


def test_healthy_maps_need_healthy_slices():
    pipe = make_pipeline(DDIBPipeline)
    item = {"image": np.zeros((1, 2, SIZE, SIZE), np.float32), "brain": np.ones((1, SIZE, SIZE), bool)}
    for slices in ([], [item | {"label": np.array([1]), "slice": np.array([0])}]):
        with pytest.raises(ValueError, match="`slices` must hold healthy slices"):
            measure_healthy_maps(pipe, slices)
    with pytest.raises(ValueError, match="`floor` must be"):
        measure_healthy_maps(pipe, [], floor=0.0)


def test_values_travel_with_the_checkpoint(prepared, tmp_path):
    pipe = make_pipeline()
    calibrate(pipe, LabelledSlices(load_prepared(prepared / "set", "validation")))
    pipe.save_pretrained(tmp_path)
    loaded = AnomalyPipeline.from_pretrained(tmp_path)
    for name in ("guidance_scale", "similarity_threshold"):
        assert loaded.config[name] == pipe.config[name]
    assert list(loaded.config.gap_scale) == list(pipe.config.gap_scale)
    loaded.set_progress_bar_config(disable=True)
    images = torch.rand(3, 2, SIZE, SIZE) * 2 - 1
    assert loaded(images).pred_mask is not None and make_pipeline()(images).pred_mask is None


def test_some_of_the_slices(prepared):
    split = load_prepared(prepared / "set", "validation")
    items = list(LabelledSlices(split, 5))
    assert sum(len(item["label"]) for item in items) == 5 and len(items) == 2
    first = items[0]
    assert first["image"].shape[1:] == (2, SIZE, SIZE) and first["image"].dtype == np.float32
    rows = [split.read_subject(split.subjects[0])["slice"].tolist().index(number) for number in first["slice"]]
    np.testing.assert_array_equal(first["image"], split.read_subject(split.subjects[0])["image"][rows])
    with pytest.raises(ValueError, match="`max_slices` must be an integer of at least 1, got 0"):
        LabelledSlices(split, 0)


def test_slices_whose_neighbours_are_left_out_are_no_calibration(prepared, tmp_path):
    pipe = tiny.make_pipeline("AnoFPDMPipeline", MODALITIES, processor_settings={"context": 1})
    pipe.save_pretrained(tmp_path / "model")
    options = {"model": [str(tmp_path / "model")], "data": str(prepared / "set"), "calibration_slices": 5}
    with pytest.raises(ValueError, match="`calibration_slices` must not be given for .*/model, which sees the neighb"):
        evaluate(EvalOptions(**options, output_dir=str(tmp_path / "report"), calibrate="labels"))


def test_similarity_threshold_needs_both_classes():
    similarity = torch.tensor([0.9, 0.95, 0.99, 0.4, 0.5])
    threshold, wrong = similarity_threshold(similarity, torch.tensor([0, 0, 0, 1, 1]))
    assert 0.5 < threshold <= 0.95 and wrong == 1  # a quantile above the smallest healthy slice
    with pytest.raises(ValueError, match="got 5 and 0: choose other validation data"):
        similarity_threshold(similarity, torch.zeros(5))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (AnoFPDMPipeline, {"policy": "masks"}, "`policy` must be one of labels, healthy, yen, otsu, got 'masks'"),
        (DDIBPipeline, {"policy": "labels"}, "DDIBPipeline has no calibration of its own"),
        (DDIBPipeline, {"policy": "yen", "guidance_scales": (1.0,)}, "`guidance_scales` belongs to the policy labels"),
    ],
)
def test_wrong_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(make_pipeline(kind), [], **arguments)


def test_evaluation_calibrates_stores_and_uses(prepared, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    shared = {"model": [str(tmp_path / "model")], "data": str(prepared / "set"), "baselines": False, "batch_size": 4}
    report = evaluate(
        EvalOptions(
            **shared,
            output_dir=str(tmp_path / "report"),
            calibrate="labels",
            guidance_scales=[1.0, 3.0],
            protocol="anofpdm",
            keep_maps=True,
        )
    )
    (row,) = report["results"]
    pipe = make_pipeline()
    expected = calibrate(
        pipe, LabelledSlices(load_prepared(prepared / "set", "validation")), guidance_scales=(1.0, 3.0), batch_size=4
    )
    assert row["calibration"] == expected
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert {name: index[name] for name in expected["values"]} == expected["values"]
    assert row["settings"]["similarity_threshold"] == expected["values"]["similarity_threshold"]

    # The cases hold the masks that the pipeline makes, and its labels.
    metrics, accuracy = row["metrics"], []
    for subject in ("test0", "test1"):
        case = Case.load(tmp_path / "report" / "maps" / "00" / "test" / f"{subject}.npz")
        item = load_prepared(prepared / "set", "test").read_subject(subject)
        result = pipe(torch.from_numpy(item["image"]), brain_mask=torch.from_numpy(item["brain"]))
        gated = case.own_mask & (case.own_labels == 1)[:, None, None]
        np.testing.assert_array_equal(gated, result.pred_mask.numpy().astype(bool) & item["brain"])
        np.testing.assert_array_equal(case.own_labels, result.slice_details["label"])
        accuracy.append((case.own_labels == item["label"]).mean())
    assert metrics["anofpdm_image_accuracy_own"] == pytest.approx(np.mean(accuracy))
    for name in ("dice_own", "anofpdm_dice_mixed_own", "anofpdm_dice_unhealthy_own", "anofpdm_iou_mixed_validation"):
        assert 0 <= metrics[name] <= 1, name
    table = (tmp_path / "report" / "report.md").read_text()
    assert "Dice, own masks, mixed (AnoFPDM)" in table and "empty" in table

    with pytest.raises(ValueError, match="`calibrate` must be one of"):
        evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "no"), calibrate="masks"))
    with pytest.raises(ValueError, match="either `calibrate` or `set_threshold`"):
        evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "no"), calibrate="labels", set_threshold="healthy"))
    with pytest.raises(ValueError, match="`calibrate` needs the checkpoint's own settings"):
        evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "no"), calibrate="labels", median_size=1))
    with pytest.raises(ValueError, match="belong to `calibrate labels`"):
        evaluate(EvalOptions(**shared, output_dir=str(tmp_path / "no"), guidance_scales=[1.0]))
