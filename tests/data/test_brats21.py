"""The packaged recipes for BraTS21 on a small folder of that layout, with splits as ANDi's authors ship them."""

import nibabel as nib
import numpy as np
import pytest

from anodiff.data.prepare import prepare_recipe, read_recipe
from anodiff.data.prepared import load_prepared


MODALITIES = ("flair", "t1", "t1ce", "t2")
SPLITS = {"train": ["BraTS2021_00003", "BraTS2021_00001"], "val": ["BraTS2021_00002"], "test": ["BraTS2021_00010"]}
SHAPE = (48, 48, 6)  # 240 x 240 x 155 in the data set


@pytest.fixture(scope="module")
def brats21(tmp_path_factory):
    root = tmp_path_factory.mktemp("brats21")
    (root / "splits").mkdir()
    random = np.random.default_rng(0)
    for split, names in SPLITS.items():
        (root / "splits" / f"scans_{split}.csv").write_text("\n".join(["BraTS21ID", *names, ""]))
        for name in names:
            (root / name).mkdir()
            seg = np.zeros(SHAPE, np.uint8)
            seg[20:24, 10:12, 2] = 1
            seg[30:34, 30:34, 3] = 4
            for modality in (*MODALITIES, "seg"):
                array = seg
                if modality != "seg":
                    array = np.zeros(SHAPE, np.float32)
                    array[8:40, 6:42, 1:] = random.uniform(50, 900, (32, 36, 5))  # the first slice is empty
                    array[12:15, 12:15, 1:] = 2000
                # As in the data set: to the left, to the back, up.
                image = nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]))
                nib.save(image, root / name / f"{name}_{modality}.nii.gz")
    return root


@pytest.mark.parametrize(("recipe", "modalities"), [("brats21_andi", MODALITIES), ("brats21_flair", ("flair",))])
def test_recipe(brats21, tmp_path, recipe, modalities):
    assert not prepare_recipe(read_recipe(recipe), brats21, tmp_path / "set", progress=False)
    train = load_prepared(tmp_path / "set", "train")
    assert train.subjects == sorted(SPLITS["train"])
    assert train.subjects != load_prepared(tmp_path / "set", "validation").subjects == SPLITS["val"]
    for name in train.subjects:
        # Neither the empty slice nor those with a label.
        np.testing.assert_array_equal(train.read_subject(name)["slice"], [1, 4, 5])
    test = load_prepared(tmp_path / "set", "test")
    item = test.read_subject("BraTS2021_00010")
    np.testing.assert_array_equal(item["slice"], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(item["label"], [0, 1, 1, 0, 0])
    assert item["image"].shape == (5, len(modalities), 128, 128) and item["mask"].shape == (5, 1, 128, 128)

    for channel, modality in enumerate(modalities):
        path = brats21 / "BraTS2021_00010" / f"BraTS2021_00010_{modality}.nii.gz"
        raw = np.asarray(nib.load(path).dataobj)
        scaled = raw / np.quantile(raw[raw > 0], 0.99)
        # Enlarging, so bilinear without a wider kernel: pixel (h, w) is between voxels; the background is exactly -1.
        assert item["image"][:, channel, 0, 0].tolist() == [-1.0] * 5
        assert item["image"][:, channel].max() > 1, "bright tissue is not clipped"
        centre = item["image"][2, channel, 64, 64]
        place = (64 + 0.5) * 48 / 128 - 0.5
        low, part = int(place), place - int(place)
        corners = scaled[low : low + 2, low : low + 2, 3]
        weights = np.array([1 - part, part])
        assert centre == pytest.approx(2 * weights @ corners @ weights - 1, abs=1e-5)
