"""Repeated draws of anomaly pipelines: members, mean and dispersion."""

import json

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from anodiff import DispersionOutput, disperse
from anodiff.evaluation.overview import draw_members

from ..tiny import SIZE, make_pipeline, make_slices, make_volume


COS, SIN = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
ROTATION = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]])
OBLIQUE = nib.affines.from_matvec(ROTATION @ np.diag([-0.9, 1.1, 4.0]), (10, -20, 5))


@pytest.mark.parametrize("name", ["AnoDDPMPipeline", "ANDiPipeline", "AnoFPDMPipeline"])
def test_member_k_is_the_call_with_its_seed(name):
    pipe = make_pipeline(name, median_size=3, threshold=0.01)
    volume = make_volume()
    result = disperse(pipe, volume, 3, generator=5, batch_size=3)
    calls = [pipe(volume, generator=5 + k, batch_size=3) for k in range(3)]
    assert result.seeds == [5, 6, 7] and result.member_maps.shape == (3, *volume.shape)
    np.testing.assert_array_equal(result.member_maps, [call.anomaly_map for call in calls])
    np.testing.assert_array_equal(result.pred_score, [call.pred_score for call in calls])
    np.testing.assert_array_equal(result.volume_score, [call.volume_score for call in calls])
    np.testing.assert_allclose(result.mean_map, result.member_maps.mean(0), rtol=1e-6, atol=0)
    np.testing.assert_allclose(result.dispersion, result.member_maps.std(0), rtol=1e-4, atol=1e-7)
    assert result.dispersion.dtype == np.float32 and result.dispersion.max() > 1e-3 * result.mean_map.max()
    # The first is a plain call in everything.
    assert result.first.settings == calls[0].settings
    np.testing.assert_array_equal(result.first.pred_mask, calls[0].pred_mask)
    # A member does not depend on how many there are.
    np.testing.assert_array_equal(
        disperse(pipe, volume, 2, generator=6, batch_size=3).member_maps, result.member_maps[1:]
    )


def test_files_lie_on_the_grid_of_the_input(tmp_path):
    pipe = make_pipeline("AnoDDPMPipeline", threshold=0.01)
    source = nib.Nifti1Image(make_volume((18, 20, 4)), OBLIQUE)
    result = disperse(pipe, source, 2, generator=torch.Generator().manual_seed(3))
    result.save(tmp_path)
    result.first.save(tmp_path)
    for name, shape in (("member_maps", (18, 20, 4, 2)), ("mean_map", (18, 20, 4)), ("dispersion", (18, 20, 4))):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        assert image.shape == shape and image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
        expected = result[name]
        np.testing.assert_array_equal(
            np.asarray(image.dataobj), np.moveaxis(expected, 0, -1) if len(shape) == 4 else expected
        )
    record = json.loads((tmp_path / "dispersion.json").read_text())
    assert record["seeds"] == [3, 4] and record["settings"]["noise_level"] == 4 and "seed" not in record["settings"]
    assert np.shape(record["pred_score"]) == (2, 4) and len(record["volume_score"]) == 2
    plain = nib.load(tmp_path / "anomaly_map.nii.gz")
    np.testing.assert_array_equal(np.asarray(plain.dataobj), result.member_maps[0])

    draw_members(result, tmp_path / "dispersion.png", "a scan")
    with PIL.Image.open(tmp_path / "dispersion.png") as picture:
        assert picture.height > 500  # a line per slice


def test_pictures_tensors_and_lists(tmp_path):
    pipe = make_pipeline("AnoDDPMPipeline")
    picture = PIL.Image.fromarray((make_volume((20, 17)) * 200).astype(np.uint8))
    result = disperse(pipe, picture, 2)
    result.save(tmp_path)
    record = json.loads((tmp_path / "dispersion.json").read_text())
    for name, expected in (
        ("member_maps_01", result.member_maps[1]),
        ("mean_map", result.mean_map),
        ("dispersion", result.dispersion),
    ):
        with PIL.Image.open(tmp_path / f"{name}.png") as image:
            levels = np.asarray(image)
        factor = record[f"{name.removesuffix('_01')}_per_grey_level"]
        assert levels.shape == (20, 17)
        np.testing.assert_allclose(levels * factor, expected, rtol=0, atol=0.51 * factor)

    slices = make_slices()
    one, two = disperse(pipe, [slices, slices + 0.1], 2)
    assert isinstance(one, DispersionOutput) and isinstance(one.dispersion, torch.Tensor)
    torch.testing.assert_close(two.member_maps[0], pipe(slices + 0.1).anomaly_map, rtol=0, atol=0)
    with pytest.raises(ValueError, match="A result of a tensor has no grid"):
        one.save(tmp_path)
    with pytest.raises(ValueError, match="A result of a tensor has no picture"):
        draw_members(one, tmp_path / "no.png", "slices")


def test_a_prepared_volume_is_shared():
    pipe = make_pipeline("AnoDDPMPipeline")
    prepared = pipe.prepare_volume(make_volume())
    np.testing.assert_array_equal(pipe(prepared).anomaly_map, pipe(make_volume()).anomaly_map)
    with pytest.raises(TypeError, match="A volume must be a path"):
        pipe(prepared, brain_mask=make_volume())


def test_what_has_no_dispersion():
    slices = torch.zeros(1, 1, SIZE, SIZE)
    for name in ("DAEPipeline", "DDIBPipeline"):
        with pytest.raises(ValueError, match="Pipeline draws nothing, so that all members would be one map"):
            disperse(make_pipeline(name), slices)
    with pytest.raises(ValueError, match="CIMDPipeline makes an ensemble by itself: call it with `num_ensemble`"):
        disperse(make_pipeline("CIMDPipeline"), slices)
    for wrong in (1, 2.0, True):
        with pytest.raises(ValueError, match="`num_members` must be an integer of at least 2"):
            disperse(make_pipeline("AnoDDPMPipeline"), slices, wrong)
    with pytest.raises(ValueError, match="either `noise` or `generator`"):
        disperse(make_pipeline("AnoDDPMPipeline"), slices, noise=torch.zeros(5, 1, 1, SIZE, SIZE))
    with pytest.raises(ValueError, match="under the key 'brain'"):
        disperse(make_pipeline("AnoDDPMPipeline"), [slices], brain_mask=torch.ones(1, SIZE, SIZE))
    with pytest.raises(TypeError, match="`generator` must be an integer"):
        disperse(make_pipeline("AnoDDPMPipeline"), slices, generator="0")
