"""Where a pipeline's brain mask comes from: given, found by its extractor, or the scan came without skull."""

from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from anodiff import AnoDDPMPipeline, AnomalyPipeline, BrainExtractor
from anodiff.pipelines.brain import find_brain
from anodiff.volumes.volume import read_volume

from ..tiny import SETTINGS, make_extractor, make_pipeline, make_raw_scan


WANTS_A_MASK = {"brain_mask": "given", "crop": "brain"}


def make(extractor: BrainExtractor | None = None, **arguments) -> AnoDDPMPipeline:
    arguments = {"processor_settings": WANTS_A_MASK, **arguments}
    return make_pipeline("AnoDDPMPipeline", noise_level=1, brain_extractor=extractor, **arguments)


@pytest.fixture(scope="module")
def scan():
    image, brain, affine = make_raw_scan()
    return nib.Nifti1Image(image, affine), brain


def test_a_raw_scan_gets_its_mask(scan, tmp_path):
    image, brain = scan
    result = make(make_extractor())(image)
    assert result.settings["brain"] == "extracted"
    assert result.brain_mask.dtype == np.uint8 and result.brain_mask.shape == image.shape
    assert (result.anomaly_map[result.brain_mask == 0] == 0).mean() > 0.95  # but for the way back from the network
    assert 2 * (brain & (result.brain_mask > 0)).sum() / (brain.sum() + result.brain_mask.sum()) > 0.95
    result.save(tmp_path / "out")
    saved = nib.load(tmp_path / "out" / "brain_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), result.brain_mask)
    np.testing.assert_allclose(saved.affine, image.affine)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["settings"]["brain"] == "extracted" and "brain_mask.nii.gz" in record["files"]
    # It is the result that giving this mask has.
    given = make()(image, brain_mask=result.brain_mask)
    np.testing.assert_array_equal(given.anomaly_map, result.anomaly_map)


@pytest.mark.parametrize("way", ["argument", "key"])
def test_a_mask_that_is_given_wins(scan, way):
    image, brain = scan
    mask = nib.Nifti1Image(np.roll(brain, 3, 0).astype(np.uint8), image.affine)
    pipe = make(make_extractor())
    result = pipe(image, brain_mask=mask) if way == "argument" else pipe({"image": image, "brain": mask})
    assert result.settings["brain"] == "given" and result.brain_mask is None
    np.testing.assert_array_equal(result.anomaly_map, make()(image, brain_mask=mask).anomaly_map)


@pytest.mark.parametrize("planes", [slice(None), slice(14, 22)], ids=["whole", "slab"])
def test_a_scan_without_skull_is_left_alone(planes):
    image, brain, affine = make_raw_scan(skull=False)
    image[tuple(np.argwhere(brain).mean(0).astype(int))] = 0.0  # a hole
    image, brain = image[..., planes], brain[..., planes]
    result = make(make_extractor())(nib.Nifti1Image(image, affine))
    assert result.settings["brain"] == "stripped" and result.brain_mask is None
    given = make()(nib.Nifti1Image(image, affine), brain_mask=brain)
    np.testing.assert_array_equal(result.anomaly_map, given.anomaly_map)


def test_a_head_on_a_background_of_zeros_is_not_stripped():
    image, brain, affine = make_raw_scan()
    result = make(make_extractor())(nib.Nifti1Image(np.where(image > 100, image, 0.0).astype(np.float32), affine))
    assert result.settings["brain"] == "extracted"


@pytest.mark.parametrize(("scale", "origin"), [(1.0, "stripped"), (1.4, "extracted")])
def test_what_is_no_larger_than_a_brain_may_be_found_in_part(scale, origin):
    """A brain without skull of 806 ml, of which the network finds 60 %, and 2.2 l of the same look."""
    image, brain, affine = make_raw_scan(skull=False)
    places = np.argwhere(brain)
    dim = places[: int(0.4 * len(places))]
    image[tuple(dim.T)] *= 0.1
    result = make(make_extractor(4.0 * scale))(nib.Nifti1Image(image, np.diag([scale, scale, scale, 1.0]) @ affine))
    assert result.settings["brain"] == origin


@pytest.mark.parametrize(("distance", "origin"), [(1.0, "stripped"), (6.0, "extracted")])
def test_a_file_that_does_not_say_how_far_apart_its_slices_are(distance, origin):
    """Nothing but a brain that is 100 mm thick is known as one; 36 slices 1 mm apart are looked at as such, too."""
    image, brain, affine = make_raw_scan(skull=False)

    def find(images, affine):
        thick = affine[2, 2] * image.shape[2]
        return brain if 99 < thick < 101 else brain & (np.arange(image.shape[2]) < 16)

    volume = read_volume(nib.Nifti1Image(image, affine @ np.diag([1.0, 1.0, distance / 6, 1.0])))
    assert find_brain(SimpleNamespace(find_brain=find), volume)[1] == origin


@pytest.mark.parametrize(("rule", "origin"), [("nonzero", "nonzero"), ("none", "none")])
def test_other_rules_are_as_they_were(scan, rule, origin):
    with_one = make(make_extractor(), processor_settings={"brain_mask": rule})(scan[0])
    without = make(processor_settings={"brain_mask": rule})(scan[0])
    assert with_one.settings["brain"] == without.settings["brain"] == origin and with_one.brain_mask is None
    np.testing.assert_array_equal(with_one.anomaly_map, without.anomaly_map)


def test_what_cannot_be_stripped_is_an_error_that_says_what_to_do(scan):
    image, _ = scan
    with pytest.raises(ValueError, match="needs a brain mask.*`anodiff strip` makes one"):
        make()(image)
    with pytest.raises(ValueError, match="is a single slice.*give its mask"):
        make(make_extractor())(np.asarray(image.dataobj)[..., 20])
    blind = make_extractor()
    blind.last.bias.data.fill_(-100.0)
    with pytest.raises(ValueError, match="no brain was found"):
        make(blind)(image)
    with pytest.raises(TypeError, match="`brain_extractor` must be a BrainExtractor or None"):
        make("brain")


def test_several_modalities_share_the_mask(scan):
    image, _ = scan
    pipe = make_pipeline(
        *("AnoDDPMPipeline", ("flair", "t1")),
        processor_settings=WANTS_A_MASK,
        noise_level=1,
        brain_extractor=make_extractor(),
    )
    result = pipe({"t1": image, "flair": image})
    assert result.settings["brain"] == "extracted" and result.brain_mask.shape == image.shape


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"CIMDPipeline"}))
def test_the_component_is_saved_and_loaded(name, tmp_path):
    make_pipeline(name).save_pretrained(tmp_path / "without")
    assert AnomalyPipeline.from_pretrained(tmp_path / "without").brain_extractor is None
    # One that is given to a pipeline that has none goes with it from then on.
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "without", brain_extractor=make_extractor(spacing=3.0))
    pipe.save_pretrained(tmp_path / "with")
    loaded = AnomalyPipeline.from_pretrained(tmp_path / "with")
    assert type(loaded) is type(pipe) and loaded.brain_extractor.config.spacing == 3.0
    assert (loaded.brain_extractor.last.bias == -1).all()


def test_pipelines_of_earlier_versions_load(tmp_path):
    make().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["brain_extractor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert AnomalyPipeline.from_pretrained(tmp_path).brain_extractor is None
