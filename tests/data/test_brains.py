import json
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from anodiff.data.phantoms import brains
from anodiff.data.phantoms.brains import LESIONS, MODALITIES, PHANTOM_SETS, TISSUE_MEANS, make_subject, write_phantom


def geometric(index=0, **options):
    return make_subject(index, anatomy="geometric", **({"spacing": 3.0} | options))


@pytest.fixture(scope="module")
def pairs():
    """Kind to three (healthy, lesion) pairs that share anatomy and noise."""
    return {kind: [(geometric(i), geometric(i, lesion=kind)) for i in range(3)] for kind in LESIONS}


def check_tissue_means(subjects):
    measured = {(modality, tissue): [] for modality in MODALITIES for tissue in range(3)}
    for subject in subjects:
        # A voxel is pure when it and its neighbours are all nearest to the same tissue.
        distance = sum(np.abs(subject.images[m][..., None] - np.array(TISSUE_MEANS[m])) for m in MODALITIES)
        nearest = np.where(subject.brain == 1, np.argmin(distance, axis=-1), -1)
        for modality, tissue in measured:
            pure = ndimage.binary_erosion(nearest == tissue)
            assert pure.sum() > 100
            measured[modality, tissue].append(subject.images[modality][pure].mean())
    for (modality, tissue), values in measured.items():
        # One subject differs by some 10 %: bias field and contrast.
        np.testing.assert_allclose(np.mean(values), TISSUE_MEANS[modality][tissue], atol=0.08)


def test_layout():
    subject = geometric(3)
    assert subject.name == "healthy_0003"
    assert tuple(subject.images) == MODALITIES
    for image in subject.images.values():
        assert image.dtype == np.float32 and image.shape == (64, 76, 60)
        assert (image[subject.brain == 0] == 0).all() and (image[subject.brain == 1] > 0).all()
        assert image.max() < 2
    assert subject.brain.dtype == np.uint8 and subject.lesion.dtype == np.uint8
    assert subject.soft_lesion.dtype == np.float32
    assert not subject.lesion.any() and not subject.soft_lesion.any()
    assert subject.parameters["lesion_volume_ml"] == 0
    np.testing.assert_array_equal(np.diag(subject.affine), [3, 3, 3, 1])
    assert 0.7e3 < subject.brain.sum() * 0.027 < 2.5e3  # ml


def test_spacing_keeps_the_field_of_view_and_the_anatomy():
    fine, coarse = geometric(spacing=3.0), geometric(spacing=6.0)
    assert coarse.brain.shape == (32, 38, 30)
    np.testing.assert_array_equal(fine.affine[:3, 3], coarse.affine[:3, 3])
    # Every second voxel of the fine grid is a voxel of the coarse one.
    np.testing.assert_array_equal(fine.brain[::2, ::2, ::2], coarse.brain)


def test_smooth_field_has_unit_variance_everywhere():
    template = brains._geometric_template()
    grid = brains._Grid((16, 19, 15), 12.0, template.origin, template.extent)
    rng = np.random.default_rng(0)
    fields = np.stack([brains._smooth_field(rng, grid, 28.0) for _ in range(2000)])
    np.testing.assert_allclose(fields.mean(axis=0), 0, atol=0.12)  # 5 standard errors
    np.testing.assert_allclose(fields.std(axis=0), 1, atol=0.08)
    neighbours = np.corrcoef(fields[:, 8, 9, 7], fields[:, 9, 9, 7])[0, 1]
    far = np.corrcoef(fields[:, 2, 9, 7], fields[:, 13, 9, 7])[0, 1]
    assert neighbours > 0.7 and abs(far) < 0.12


def test_tissue_means():
    check_tissue_means([geometric(i) for i in range(6)])


def test_subjects_differ_and_repeat():
    first, again = geometric(4, lesion="ms"), geometric(4, lesion="ms")
    for modality in MODALITIES:
        np.testing.assert_array_equal(first.images[modality], again.images[modality])
    np.testing.assert_array_equal(first.soft_lesion, again.soft_lesion)
    assert first.parameters == again.parameters
    for other in (geometric(5), geometric(4, seed=1)):
        assert (first.brain != other.brain).sum() > 100


@pytest.mark.parametrize("kind", LESIONS)
def test_lesions(pairs, kind):
    for healthy, subject in pairs[kind]:
        assert subject.name.startswith(f"{kind}_")
        np.testing.assert_array_equal(subject.lesion > 0, subject.soft_lesion > 0.5)
        assert not subject.lesion[subject.brain == 0].any() and not subject.soft_lesion[subject.brain == 0].any()
        assert subject.soft_lesion.min() >= 0 and subject.soft_lesion.max() <= 1
        volume = subject.parameters["lesion_volume_ml"]
        assert 0.05 <= volume <= 150
        np.testing.assert_allclose(volume, (subject.lesion > 0).sum() * 0.027)
        np.testing.assert_array_equal(subject.brain, healthy.brain)
        # A lesion changes nothing but itself, is bright on FLAIR, and the mask says where.
        difference = subject.images["flair"] - healthy.images["flair"]
        inside, far = subject.lesion == 1, ndimage.grey_dilation(subject.soft_lesion, 3) < 1e-4
        np.testing.assert_allclose(difference[far], 0, atol=1e-3)
        outside = (subject.lesion == 0) & (subject.brain == 1)
        assert difference[inside].mean() > 0.15
        assert abs(difference[outside].mean()) < 0.02


def test_ms_has_several_components(pairs):
    for _, subject in pairs["ms"]:
        assert ndimage.label(subject.lesion)[1] >= 3


def test_stroke_stays_in_one_hemisphere_and_reaches_the_cortex(pairs):
    for _, subject in pairs["stroke"]:
        x = (np.argwhere(subject.lesion)[:, 0] - (subject.lesion.shape[0] - 1) / 2) * 3.0
        assert max((x > -10).mean(), (x < 10).mean()) == 1  # the midline of a subject is bent and turned by a few mm
        surface = ndimage.binary_dilation(subject.brain == 0, iterations=4)
        assert (surface & (subject.lesion > 0)).any()


def test_core_is_necrotic():
    subject = next(s for s in (geometric(i, lesion="tumour") for i in range(20)) if (s.lesion == 2).sum() > 30)
    assert subject.parameters["lesion_parameters"]["core"]
    flair, t1 = subject.images["flair"], subject.images["t1"]
    assert flair[subject.lesion == 2].mean() < flair[subject.lesion == 1].mean() - 0.2
    assert t1[subject.lesion == 2].mean() < t1[subject.lesion == 1].mean()


def test_fluid_is_in_neither_the_image_nor_the_mask_of_a_lesion(pairs):
    fluid_in_mask, fluid_in_lesion = 0, 0
    for kind in ("tumour", "stroke"):
        for healthy, subject in pairs[kind]:
            fluid = (healthy.images["flair"] < 0.2) & (subject.brain == 1)
            fluid_in_mask += (fluid & (subject.lesion > 0)).sum()
            fluid_in_lesion += (fluid & (subject.soft_lesion > 0.2)).sum()
            assert subject.soft_lesion[fluid].max() < 0.6
    assert fluid_in_lesion > 20  # there was fluid to keep out
    assert fluid_in_mask < 0.02 * fluid_in_lesion


def test_contrast_sweep():
    healthy = geometric(1)
    sweep = [geometric(1, lesion="tumour", contrast=kappa) for kappa in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for modality in MODALITIES:
        np.testing.assert_array_equal(sweep[0].images[modality], healthy.images[modality])
        steps = [np.abs(s.images[modality] - healthy.images[modality]).mean() for s in sweep]
        assert (np.diff(steps) > 0).all()
    for subject in sweep:
        np.testing.assert_array_equal(subject.lesion, sweep[-1].lesion)


def test_jacobian_determinant():
    grid = np.stack(np.meshgrid(*(3.0 * np.arange(n) for n in (6, 7, 8)), indexing="ij"))
    matrix = np.array([[1.1, 0.2, 0.0], [0.1, 0.9, 0.3], [0.0, 0.1, 1.2]])
    mapped = np.tensordot(matrix, grid, axes=1)
    np.testing.assert_allclose(brains._jacobian_determinant(mapped, 3.0), np.linalg.det(matrix), rtol=1e-10)


def test_folding_shapes_are_rejected(monkeypatch):
    assert all(geometric(i, spacing=6.0).parameters["smallest_jacobian"] > 0.2 for i in range(5))
    monkeypatch.setattr(brains, "DISPLACEMENT", ((28.0, 40.0),))
    with pytest.raises(RuntimeError, match="Jacobian"):
        geometric(spacing=6.0)


def test_save_round_trip(tmp_path):
    subject = geometric(2, lesion="tumour")
    subject.save(tmp_path / "deep" / subject.name)
    folder = tmp_path / "deep" / "tumour_0002"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*(f"{m}.nii.gz" for m in MODALITIES), "brain.nii.gz", "lesion.nii.gz", "phantom.json"]
    )
    for modality, expected in subject.images.items():
        image = nib.load(folder / f"{modality}.nii.gz")
        assert image.get_data_dtype() == np.int16
        np.testing.assert_array_equal(image.affine, subject.affine)
        np.testing.assert_allclose(image.get_fdata() / 1000, expected, rtol=0, atol=0.5001e-3)
    for name, expected in (("brain", subject.brain), ("lesion", subject.lesion)):
        image = nib.load(folder / f"{name}.nii.gz")
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
    parameters = json.loads((folder / "phantom.json").read_text())
    assert parameters == subject.parameters
    assert parameters["seed"] == 0 and parameters["index"] == 2 and parameters["lesion"] == "tumour"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"index": -1}, ValueError, "`index`"),
        ({"index": 1.5}, ValueError, "`index`"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"lesion": "bleed"}, ValueError, "`lesion`.*tumour"),
        ({"anatomy": "colin27"}, ValueError, "`anatomy`.*geometric"),
        ({"spacing": 0.5}, ValueError, "`spacing`"),
        ({"contrast": 1.1}, ValueError, "`contrast`"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        make_subject(**({"index": 0, "anatomy": "geometric"} | options))


def test_sets():
    sizes = {
        name: {split: sum(n for _, n in counts) for split, counts in splits.items()}
        for name, splits in PHANTOM_SETS.items()
    }
    assert sizes["phantom-mini"] == {"train": 16, "validation": 8, "test": 8}
    assert sizes["phantom-std"] == {"train": 200, "validation": 40, "test": 60}
    for splits in PHANTOM_SETS.values():
        assert [lesion for lesion, _ in splits["train"]] == [None]
        assert all({lesion for lesion, _ in splits[s]} == {None, *LESIONS} for s in ("validation", "test"))


def test_write_phantom(tmp_path):
    write_phantom(tmp_path / "set", seed=3, anatomy="geometric", spacing=6.0, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    subjects = []
    for split, size in (("train", 16), ("validation", 8), ("test", 8)):
        header, *names = (tmp_path / "set" / "splits" / f"{split}.csv").read_text().splitlines()
        assert header == "subject" and len(names) == size
        subjects += names
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == sorted([*subjects, "splits"])
    # The set is made of the same subjects as single calls.
    kind, index = subjects[-1].rsplit("_", 1)
    expected = geometric(int(index), lesion=kind, seed=3, spacing=6.0)
    lesion = nib.load(tmp_path / "set" / subjects[-1] / "lesion.nii.gz")
    np.testing.assert_array_equal(np.asarray(lesion.dataobj), expected.lesion)
    with pytest.raises(FileExistsError, match="`folder`"):
        write_phantom(tmp_path / "set", anatomy="geometric", progress=False)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(index, **options):
        if index == 2:
            raise KeyboardInterrupt
        return make_subject(index, **options)

    monkeypatch.setattr(brains, "make_subject", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "set", anatomy="geometric", spacing=6.0, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_unknown_set(tmp_path):
    with pytest.raises(ValueError, match="`name`.*phantom-mini"):
        write_phantom(tmp_path / "set", "phantom-maxi")


def test_mni152():
    pytest.importorskip("nilearn", reason='needs pip install "anodiff[phantom]"')
    healthy, subject = make_subject(0), make_subject(0, lesion="tumour")
    assert healthy.brain.shape == (99, 117, 95)
    np.testing.assert_array_equal(healthy.affine, [[2, 0, 0, -98], [0, 2, 0, -134], [0, 0, 2, -72], [0, 0, 0, 1]])
    assert 1.4e3 < healthy.brain.sum() * 0.008 < 2.6e3  # ml
    assert subject.lesion.any()
    check_tissue_means([make_subject(i) for i in range(4)])


def test_mni152_without_nilearn_says_what_to_install(monkeypatch):
    brains._mni152_template.cache_clear()
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    with pytest.raises(ImportError, match=r"anodiff\[phantom\]"):
        make_subject(0)
