"""The loader's chain of transforms of cDDPM and SADM against arrays recorded from torchio and SimpleITK.

The recorded arrays are (x, y, z) with all axes as in LPS. `full_compose` is the whole chain once more.
"""

import nibabel as nib
import numpy as np
import pytest

from anodiff import VolumeProcessor
from anodiff.data.prepare import read_recipe

from .recordings import over


SPACING = (0.8, 1.0, 1.2)  # of the recording, see its README


def image(array: np.ndarray) -> nib.Nifti1Image:
    array = array.astype(np.uint8) if array.dtype == bool else array
    return nib.Nifti1Image(array, np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0]))


def make_processor(arrays, factor: int, **settings) -> VolumeProcessor:
    """The processor of the packaged recipe with the sizes of the recording; smoothing only where it is asked for."""
    width, height, depth = arrays["image_dim"].tolist()
    recipe = read_recipe("sadm_t1")["processor"] | {"modalities": ["image"], "curvature_flow": 0}
    sizes = {"crop": (height, width, depth), "size": (height // factor, width // factor)}
    return VolumeProcessor.from_dict(recipe | sizes | settings)


def on_xyz(slices) -> np.ndarray:
    return np.asarray(slices).transpose(2, 1, 0)


@over("sadm/preprocess*.npz")
def test_smoothing(path):
    pytest.importorskip("SimpleITK", reason="the extra `preprocess` is missing")
    arrays = np.load(path, allow_pickle=False)
    settings = read_recipe("sadm_t1")["processor"]["curvature_flow"]
    plain = VolumeProcessor(
        size=None,
        intensity="given",
        input_range=(0.0, 1.0),
        value_range=(0.0, 1.0),
        clip=False,
        brain_mask="none",
        curvature_flow=settings,
    )
    slices = plain.preprocess(image(arrays["vol_in"])).slices
    largest = np.abs(arrays["vol_curvature"]).max()
    np.testing.assert_allclose(on_xyz(slices[:, 0]), arrays["vol_curvature"], rtol=0, atol=1e-6 * largest)

    # From the file to the network's grid.
    processor = make_processor(arrays, int(arrays["rescale"]), curvature_flow=settings)
    slices = processor.preprocess(image(arrays["vol_in"]), image(arrays["mask_in"])).slices
    np.testing.assert_allclose(on_xyz(slices[:, 0]), arrays["vol_resampled"], rtol=0, atol=1e-4)


@over("sadm/preprocess*.npz")
def test_crop_or_pad(path):
    arrays = np.load(path, allow_pickle=False)
    processor = make_processor(arrays, 1, intensity="given", input_range=(0.0, 1.0))
    processed = processor.preprocess(image(arrays["vol_curvature"].astype(np.float32)), image(arrays["mask_in"]))
    largest = np.abs(arrays["vol_crop"]).max()
    np.testing.assert_allclose(on_xyz(processed.slices[:, 0]), arrays["vol_crop"], rtol=0, atol=1e-6 * largest)
    np.testing.assert_array_equal(on_xyz(processed.brain), arrays["mask_crop"] > 0)


@over("sadm/preprocess*.npz")
def test_rescaled_intensities(path):
    arrays = np.load(path, allow_pickle=False)
    processed = make_processor(arrays, 1).preprocess(
        image(arrays["vol_curvature"].astype(np.float32)), image(arrays["mask_in"])
    )
    np.testing.assert_allclose(on_xyz(processed.slices[:, 0]), arrays["vol_rescaled"], rtol=0, atol=1e-5)


@over("sadm/preprocess*.npz")
def test_resampled_volumes_and_masks(path):
    arrays = np.load(path, allow_pickle=False)
    processor = make_processor(arrays, int(arrays["rescale"]))
    processed = processor.preprocess(image(arrays["vol_curvature"].astype(np.float32)), image(arrays["mask_in"]))
    assert processed.slices.shape[2:] == processor.config.size
    for name in ("vol_resampled", "full_compose"):
        np.testing.assert_allclose(on_xyz(processed.slices[:, 0]), arrays[name], rtol=0, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(on_xyz(processed.brain), arrays["mask_resampled"] > 0)
    lesion = processor.preprocess_mask(image(arrays["seg_in"]), processed.geometry)
    np.testing.assert_array_equal(on_xyz(lesion), arrays["seg_resampled"])
