"""Volumes and components of masks, by region."""

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from anodiff import AnomalyOutput
from anodiff.cohorts.measures import measure_folder, measure_mask, measure_result, read_atlas, read_region_names
from anodiff.volumes.volume import InputVolume, read_volume

from ..tiny import make_pipeline, make_volume


AFFINE = np.diag([2.0, -2.0, 2.5, 1.0])  # 10 mm3 per voxel


def volume(array, **values) -> InputVolume:
    return InputVolume(
        {"": array}, **{"affine": AFFINE, "header": None, "is_picture": False, "ndim": 3, "name": "m"} | values
    )


def test_components_are_connected_with_corners_and_counted_in_every_region():
    mask, labels = np.zeros((8, 6, 4), np.float32), np.zeros((8, 6, 4), np.int32)
    labels[:4], labels[4:], labels[:, :, 3] = 7, 2, 0
    mask[2:6, 1, 1] = 1  # half in each region
    mask[6, 2, 2] = 1  # touches it with a corner
    mask[0, 5, 3] = 1  # outside of all
    mask[0, 0, 0] = mask[0, 2, 0] = 1  # two in region 7
    found, regions = measure_mask(volume(mask), labels, {7: "left", 9: "nowhere"})
    assert found == pytest.approx(
        {"marked_voxels": 8, "marked_ml": 0.08, "components": 4, "largest_component_ml": 0.05}
    )
    columns = ("region", "name", "region_voxels", "marked_voxels", "components")
    assert [tuple(region[name] for name in columns) for region in regions] == [
        (0, "outside", 48, 1, 1),
        (2, None, 72, 3, 1),
        (7, "left", 72, 4, 3),
    ]
    assert [region["marked_ml"] for region in regions] == pytest.approx([0.01, 0.03, 0.04])
    assert [region["region_ml"] for region in regions] == pytest.approx([0.48, 0.72, 0.72])


def test_an_empty_mask_has_regions_without_marks():
    found, regions = measure_mask(volume(np.zeros((4, 4, 2), np.float32)), np.ones((4, 4, 2), np.int32))
    assert found == {"marked_voxels": 0, "marked_ml": 0, "components": 0, "largest_component_ml": 0}
    assert [(row["region"], row["marked_voxels"], row["components"]) for row in regions] == [(1, 0, 0)]


@pytest.mark.parametrize("name", ["scan.nii.gz", "flat.nii.gz", "picture.png"])
def test_a_result_and_its_files_measure_alike(tmp_path, name):
    array = make_volume((12, 16, 1 if name != "scan.nii.gz" else 3))
    if name == "picture.png":
        PIL.Image.fromarray((array[..., 0].T * 200).astype(np.uint8)).save(tmp_path / name)
    else:
        nib.save(nib.Nifti1Image(array[..., 0] if name == "flat.nii.gz" else array, AFFINE), tmp_path / name)
    pipe = make_pipeline("AnoDDPMPipeline")
    threshold = float(np.quantile(pipe(tmp_path / name).anomaly_map, 0.7))
    result = pipe(tmp_path / name, threshold=threshold)
    result.save(tmp_path / "out")
    labels = (np.indices(read_volume(tmp_path / name).shape)[0] > 6).astype(np.int32)
    found, regions = measure_result(result, labels)
    assert (found, regions) == measure_folder(tmp_path / "out", labels)
    count = int(np.count_nonzero(result.pred_mask))
    assert 0 < found["marked_voxels"] == count == sum(region["marked_voxels"] for region in regions)
    assert found["marked_ml"] == (None if name == "picture.png" else pytest.approx(count * 0.01))
    assert found["threshold"] == threshold and found["volume_score"] == result.volume_score
    assert found["max_slice_score"] == pytest.approx(max(result.pred_score))


def test_a_result_without_a_mask_has_scores_alone():
    source = volume(np.zeros((4, 4, 2), np.float32))
    result = AnomalyOutput(source.arrays[""], np.array([0.5, 2.0]), 1.5, settings={"threshold": None}, source=source)
    assert measure_result(result) == ({"volume_score": 1.5, "max_slice_score": 2.0, "threshold": None}, [])


def test_the_majority_of_an_ensemble_counts(tmp_path):
    nib.save(nib.Nifti1Image(make_volume((12, 16, 2)), AFFINE), tmp_path / "scan.nii.gz")
    result = make_pipeline("CIMDPipeline")(tmp_path / "scan.nii.gz")
    result.save(tmp_path / "out")
    found, _ = measure_result(result)
    assert found == measure_folder(tmp_path / "out")[0]
    assert found["volume_score"] is None and found["marked_voxels"] == np.count_nonzero(result.majority_mask)


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.ones((4, 4, 3)), AFFINE, r"must lie on the grid of m: shape \(4, 4, 2\), got \(4, 4, 3\)"),
        (np.ones((4, 4, 2)), np.eye(4), "must lie on the grid of m: .*; affine"),
        (np.full((4, 4, 2), 1.5), AFFINE, "must hold one whole number from 0 to 16777215 per voxel, got 1.5 to 1.5"),
        (np.full((4, 4, 2), -1.0), AFFINE, "must hold one whole number from 0"),
        (np.full((4, 4, 2), 2.0**24), AFFINE, "must hold one whole number from 0"),
    ],
)
def test_an_atlas_that_does_not_fit(tmp_path, array, affine, message):
    nib.save(nib.Nifti1Image(array.astype(np.float32), affine), tmp_path / "atlas.nii.gz")
    with pytest.raises(ValueError, match=message):
        read_atlas(tmp_path / "atlas.nii.gz", volume(np.zeros((4, 4, 2), np.float32)))


def test_names_of_regions(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("index\tname\tcolor\n2035\tInsula, links\t#fff\n\n1\tß\tn/a\n", encoding="utf-8")
    assert read_region_names(path) == {2035: "Insula, links", 1: "ß"}
    for content, message in {
        "label\tname\n1\ta\n": "names.tsv, line 1: names of regions must have the columns `index` and `name`",
        "index\tname\n1\ta\n1\tb\n": "names.tsv, line 3: each line must have 2 cells and an index of its own",
        "index\tname\n1\n": "names.tsv, line 2: each line must have 2 cells",
        "index\tname\nx\ta\n": "names.tsv, line 2: each line must",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_region_names(path)
