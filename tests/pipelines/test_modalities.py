"""Volumes that lack modalities which the network does without."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from anodiff import AnomalyPipeline, VolumeProcessor, disperse
from anodiff.pipelines.guarantee import describe_scoring, find_changes

from ..tiny import SETTINGS, assert_same_map, make_pipeline, make_unet, make_volume


MODALITIES = ("t1", "flair", "t2")
METHODS = [
    ("ANDiPipeline", {}),
    ("ANDiPipeline", {"normative_blocks": True, "block_length": 2, "modality_reduction": "mean"}),
    ("AnoDDPMPipeline", {}),
    ("AnoDDPMPipeline", {"mode": "one_shot", "modality_reduction": "max"}),
    ("AnoDDPMPipeline", {"map_type": "mahalanobis_pixel", "num_draws": 2}),
    ("AnoDDPMPipeline", {"map_type": "mahalanobis", "num_draws": 2, "sign": "brighter", "weighting": "intensity"}),
]


def make(name: str = "AnoDDPMPipeline", **settings):
    return make_pipeline(name, MODALITIES, **{"optional_modalities": list(MODALITIES), **settings})


def volumes(*names: str) -> dict[str, np.ndarray]:
    return {name: make_volume(seed=MODALITIES.index(name)) for name in names}


@pytest.mark.parametrize(("name", "settings"), METHODS)
def test_a_missing_modality_has_no_part_in_the_map(name, settings):
    """Neither what it shows nor its noise: it may as well be there and be left out."""
    pipe = make(name, **settings)
    output = pipe(volumes("t2", "t1"))
    everything = pipe(volumes(*MODALITIES))
    assert output.anomaly_map.shape == everything.anomaly_map.shape
    assert output.settings["present_modalities"] == ["t1", "t2"] and everything.settings["present_modalities"] is None
    assert np.abs(output.anomaly_map - everything.anomaly_map).max() > 1e-3 * everything.anomaly_map.max()
    for flair in (make_volume(seed=1), 1e3 * make_volume(seed=7)):
        left_out = pipe({**volumes("t1", "t2"), "flair": flair}, present_modalities=["t2", "t1"], batch_size=2)
        assert_same_map(left_out.anomaly_map, output.anomaly_map)
        assert left_out.warnings == output.warnings and left_out.settings == output.settings
    assert everything.warnings is None and len(output.warnings) == 1


@pytest.mark.parametrize(("name", "settings"), METHODS[:4])
def test_what_the_network_sees(name, settings):
    """The lowest value of the range instead of a missing modality at every step, and of the others what it always
    sees."""
    pipe, seen = make(name, **settings), []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    pipe(volumes(*MODALITIES), batch_size=100)
    everything = list(seen)
    seen.clear()
    pipe(volumes("flair"), batch_size=100)
    assert len(seen) == len(everything)
    assert all((one[:, [0, 2]] == -1).all() and one[:, 1].std() > 0.1 for one in seen)
    torch.testing.assert_close(seen[0][:, 1], everything[0][:, 1])


@pytest.mark.parametrize("name", ["ANDiPipeline", "AnoDDPMPipeline"])
def test_a_missing_modality_is_missing_in_neighbouring_slices_too(name):
    pipe = make(name, unet=make_unet(9), processor_settings={"context": 1})
    output, seen = pipe(volumes("t1", "t2")), []
    left_out = pipe(volumes(*MODALITIES), present_modalities=["t1", "t2"])
    assert_same_map(left_out.anomaly_map, output.anomaly_map)
    pipe.unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    pipe(volumes("t1", "t2"))
    assert all((one[:, 1::3] == -1).all() and (one[:, [0, 2, 3, 5, 6, 8]].std((2, 3)) > 0.1).all() for one in seen)


def test_the_reconstruction_has_the_modalities_of_the_volume(tmp_path):
    pipe = make()
    output = pipe(volumes("t1", "t2"))
    assert output.reconstruction.shape == (*make_volume().shape, 2)
    # In the units of each: t2 is the second one of the volume, and the third one of the checkpoint.
    both = pipe({"t1": make_volume(seed=0), "t2": 100 * make_volume(seed=2)}).reconstruction
    np.testing.assert_allclose(both[..., 0], output.reconstruction[..., 0], rtol=1e-4)
    np.testing.assert_allclose(both[..., 1], 100 * output.reconstruction[..., 1], rtol=1e-3, atol=1e-2)
    pipe(volumes("t2")).save(tmp_path)
    assert nib.load(tmp_path / "reconstruction.nii.gz").shape == make_volume().shape


def test_a_result_says_what_was_missing(tmp_path):
    pipe = make(threshold=0.25)
    output = pipe(volumes("flair"))
    missing, threshold = output.warnings
    assert missing == "Without t1, t2: the map is made of flair alone."
    assert threshold.startswith("The threshold 0.25 was set with all modalities") and "[flair]" in threshold
    output.save(tmp_path)
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert record["warnings"] == output.warnings and record["settings"]["present_modalities"] == ["flair"]
    # A threshold of the call is meant for this volume.
    assert pipe(volumes("flair"), threshold=0.25).warnings == [missing]
    assert disperse(pipe, volumes("flair"), 2).first.warnings == output.warnings
    pipe(volumes(*MODALITIES)).save(tmp_path)
    assert "warnings" not in json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))


def test_a_guarantee_is_of_all_modalities():
    pipe = make()
    settings = pipe.default_settings()
    record = {"settings": describe_scoring(pipe, settings, 0)}
    del record["settings"]["present_modalities"]  # of a calibration by an earlier version
    assert find_changes(record, describe_scoring(pipe, settings, 0)) == []
    fewer = describe_scoring(pipe, {**settings, "present_modalities": ["t1"]}, 0)
    assert find_changes(record, fewer) == ["present_modalities"]


def test_a_saved_pipeline_knows_what_it_does_without(tmp_path):
    pipe = make("ANDiPipeline", optional_modalities=["t1"])
    pipe.save_pretrained(tmp_path)
    loaded = AnomalyPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.may_lack == ["t1"]
    assert_same_map(loaded(volumes("flair", "t2")).anomaly_map, pipe(volumes("flair", "t2")).anomaly_map)


@pytest.mark.parametrize("name", SETTINGS)
def test_without_such_a_training_every_modality_is_needed(name):
    pipe = make_pipeline(name, MODALITIES)
    assert pipe.may_lack == []
    with pytest.raises(ValueError, match=r"missing: flair, unknown: none. Training with `objective.modality_dropout`"):
        pipe(volumes("t1", "t2"))


def test_what_cannot_be_missing():
    pipe = make(optional_modalities=["t1", "t2"])
    with pytest.raises(
        ValueError, match="missing: flair, unknown: none. It does without t1 or t2, but not without all"
    ):
        pipe(volumes("t1"))
    with pytest.raises(ValueError, match="missing: none, unknown: pd"):
        pipe({**volumes("flair"), "pd": make_volume()})
    with pytest.raises(ValueError, match=r"has 1 channel\(s\), .* in this order. A dict may lack t1 or t2"):
        pipe(make_volume())
    with pytest.raises(ValueError, match="`present_modalities` must hold flair, which this checkpoint does not do"):
        pipe(volumes(*MODALITIES), present_modalities=["t1"])
    with pytest.raises(ValueError, match="`present_modalities` must be one of t1, flair, got 't2'"):
        pipe(volumes("t1", "flair"), present_modalities=["flair", "t2"])
    with pytest.raises(ValueError, match="`present_modalities` must be different ones of t1, flair, t2, got 'flair'"):
        pipe(volumes(*MODALITIES), present_modalities="flair")
    with pytest.raises(ValueError, match=r"`optional_modalities` must be different ones of .*, got \['pd'\]"):
        make(optional_modalities=["pd"])
    with pytest.raises(ValueError, match="missing: t1, flair, t2, unknown: pd. It does without"):
        make()({"pd": make_volume()})


@pytest.mark.parametrize(
    "rule", ["percentile", "slice_minmax", "brain_percentiles", "brain_median", "mean_std", "given"]
)
def test_slices_of_the_other_modalities_are_as_always(rule):
    processor = VolumeProcessor(modalities=MODALITIES, size=(16, 16), intensity=rule, input_range=(0, 2))
    given = volumes("t1", "t2")
    everything = processor.preprocess(volumes(*MODALITIES))
    fewer = processor.preprocess(given, optional=["flair"])
    torch.testing.assert_close(fewer.slices[:, [0, 2]], everything.slices[:, [0, 2]])
    assert (fewer.slices[:, 1] == -1).all() and fewer.slices.dtype == torch.float32
    np.testing.assert_allclose(
        processor.postprocess_image(fewer.slices, fewer),
        processor.postprocess_image(everything.slices, everything)[[0, 2]],
        rtol=1e-5,
        atol=1e-5,
    )
