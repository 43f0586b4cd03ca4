"""Synthetic heads of label maps."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pytest
import torch

from anodiff.data.phantoms import head_draws, head_files, sets
from anodiff.data.phantoms.head_draws import HeadDraws
from anodiff.data.phantoms.head_files import write_heads
from anodiff.data.phantoms.head_maps import write_head_maps
from anodiff.data.phantoms.heads import LESIONS, make_slices
from anodiff.data.phantoms.label_maps import CORTEX, FLUID, LABELS, TISSUES, WHITE, read_label_maps, read_lesion_masks
from anodiff.data.phantoms.sets import is_phantom, prepare_heads
from anodiff.data.prepared import load_prepared
from anodiff.preprocess import main as preprocess
from anodiff.schedulers.draws import make_keys


# Semi-axes in mm of ellipsoids, one in another, from left to right, front to back, bottom to top; and FreeSurfer's
# labels of the left and right half.
LAYERS = (
    ((88, 108, 92), (511, 511)),
    ((80, 100, 84), (515, 515)),
    ((74, 94, 78), (24, 24)),
    ((70, 90, 74), (3, 42)),
    ((60, 80, 64), (2, 41)),
    ((14, 30, 16), (4, 43)),
)


def head(scale: float = 1.0, spacing: float = 3.0) -> nib.Nifti1Image:
    """A head of ellipsoids, with its centre at (5, -8, 11) mm."""
    shape = (66, 80, 68)
    places = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * spacing for n in shape], indexing="ij"), -1)
    labels = np.zeros(shape, np.int16)
    for axes, (left, right) in LAYERS:
        inside = ((places / (np.array(axes) * scale)) ** 2).sum(-1) < 1
        labels[inside & (places[..., 0] < 0)], labels[inside & (places[..., 0] >= 0)] = left, right
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = np.array([5, -8, 11]) - spacing * (np.array(shape) - 1) / 2
    return nib.Nifti1Image(labels, affine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label_maps")
    for number, scale in enumerate((0.92, 0.96, 1.0, 1.04)):
        nib.save(head(scale), folder / f"head_{number}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def maps(folder):
    return read_label_maps(folder)


def slices(maps, count=3, seed=0, positions=(-20.0, 0.0, 24.0), **options):
    numbers = torch.arange(count)
    options = {"size": (96, 80), "spacing": 2.5, "thickness": torch.full((count,), 4.0), **options}
    keys = make_keys(seed, numbers, 0)
    return make_slices(maps, numbers % len(maps), keys, torch.tensor(positions).repeat(count, 1), **options)


def test_a_slice_depends_on_its_head_and_place_only(maps):
    several = slices(maps, 3, contrasts=("flair", "t1"), lesions=["tumour", "ms", None])
    one = make_slices(
        maps,
        torch.tensor([1]),
        make_keys(0, torch.tensor([1]), 0),
        torch.tensor([[24.0]]),
        contrasts=("flair", "t1"),
        size=(96, 80),
        spacing=2.5,
        thickness=torch.tensor([4.0]),
        lesions=["ms"],
    )
    assert torch.equal(one.tissues[0, 0], several.tissues[1, 2]) and torch.equal(one.brain[0, 0], several.brain[1, 2])
    assert torch.equal(one.lesion[0, 0], several.lesion[1, 2])
    torch.testing.assert_close(one.images[0, :, 0], several.images[1, :, 2], atol=1e-5, rtol=0)
    other = slices(maps, 3, seed=1, contrasts=("flair", "t1"))
    assert (other.images - several.images).abs().mean() > 0.05


def test_a_second_look_at_a_head_draws_the_noise_of_its_slices_only(maps, monkeypatch):
    keys, options = (
        make_keys(0, torch.arange(2), 0),
        {"contrasts": ("any", "t1"), "mask_errors": True, "size": (40, 32)},
    )
    draws, places = HeadDraws(keys), torch.tensor([[0.0], [9.0]])
    make_slices(maps, torch.arange(2), draws, places + 3, spacing=6.0, lesions=["tumour", None], **options)
    drawn = []
    for name in ("normal", "uniform"):
        draw = getattr(head_draws, name)
        monkeypatch.setattr(head_draws, name, lambda *key, draw=draw: drawn.append(key) or draw(*key))
    again = make_slices(maps, torch.arange(2), draws, places, **options)
    assert not drawn
    fresh = make_slices(maps, torch.arange(2), keys, places, **options)
    assert drawn and torch.equal(again.images, fresh.images) and torch.equal(again.brain, fresh.brain)


def test_contrasts_are_those_of_their_sequences(maps):
    made = slices(maps, 24, contrasts=("t1", "t2", "flair", "any"), positions=(0.0,))
    means = {
        (contrast, tissue): np.array(
            [float(made.images[head, channel][made.tissues[head] == tissue].mean()) for head in range(24)]
        )
        for channel, contrast in enumerate(("t1", "t2", "flair", "any"))
        for tissue in (WHITE, CORTEX, FLUID)
    }
    assert (means["t1", WHITE] > means["t1", CORTEX]).all() and (means["t1", CORTEX] > means["t1", FLUID]).all()
    assert (means["t2", FLUID] > means["t2", CORTEX]).all() and (means["t2", CORTEX] > means["t2", WHITE]).all()
    assert (means["flair", CORTEX] > means["flair", FLUID]).all()
    assert (means["flair", CORTEX] > means["flair", WHITE]).sum() >= 18  # shading may turn it round
    brighter = means["any", WHITE] > means["any", CORTEX]
    assert 4 <= brighter.sum() <= 20


def test_the_mask_is_the_brain_and_nothing_of_the_head(maps):
    made = slices(maps, 6)
    tissue = (made.tissues > 0) & (made.tissues < TISSUES.index("vessel"))
    outside = (made.tissues == TISSUES.index("skin")) | (made.tissues == TISSUES.index("bone"))
    assert (made.brain & tissue).sum() > 0.99 * tissue.sum()
    assert (made.brain & outside).sum() < 0.02 * outside.sum()


@pytest.mark.parametrize("kind", LESIONS)
def test_lesions_lie_in_the_brain_and_look_as_they_should(maps, kind):
    count, positions = 4, tuple(range(-45, 50, 6))
    usual = slices(maps, count, positions=positions, contrasts=("flair", "t1", "t2"), lesions=[kind] * count)
    healthy = slices(maps, count, positions=positions, contrasts=("flair", "t1", "t2"))
    assert usual.lesion.flatten(1).any(1).all() and not (usual.lesion & ~usual.brain).any()
    assert not healthy.lesion.any() and torch.equal(healthy.brain, usual.brain)
    solid = usual.lesion & (usual.tissues == WHITE)
    difference = (usual.images - healthy.images).transpose(0, 1)[:, solid].mean(1)
    assert difference[0] > 0.1 and difference[1] < -0.1 and difference[2] > 0.05
    for look, sign in (("hyper", 1), ("hypo", -1)):
        made = slices(maps, count, positions=positions, contrasts=("t1",), lesions=[kind] * count, look=look)
        assert sign * float((made.images - healthy.images[:, 1:2])[:, 0][solid].mean()) > 0.1
    same = slices(maps, count, positions=positions, contrasts=("t1",), lesions=[kind] * count, look="iso")
    assert abs(float((same.images - healthy.images[:, 1:2])[:, 0][solid].mean())) < 0.08


def test_a_given_lesion_lies_where_its_tissue_does(folder, maps, tmp_path):
    # Of each map the left half of the white matter, which bends with the head and may change sides with it.
    for number in range(3):
        image = nib.load(folder / f"head_{number}.nii.gz")
        left = nib.Nifti1Image((np.asarray(image.dataobj) == 2).astype(np.uint8), image.affine)
        nib.save(left.as_reoriented(nib.orientations.axcodes2ornt("PIL")), tmp_path / f"{number}.nii.gz")
    masks = read_lesion_masks([tmp_path / f"{number}.nii.gz" for number in range(3)], (5, -8, 11))
    options = {"positions": (-20.0, 0.0, 24.0), "contrasts": ("flair", "t1"), "thickness": None, "samples": 1}
    made, healthy = slices(maps, lesion_masks=masks, **options), slices(maps, **options)
    white = made.tissues == WHITE
    assert not (made.lesion & ~white).any() and 0.4 < made.lesion.sum() / white.sum() < 0.6
    columns = torch.arange(80).expand_as(made.lesion)
    sides = [columns[head][made.lesion[head]].float().mean() > 40 for head in range(3)]
    for head, on_the_right in enumerate(sides):  # all of the half, but for the seam
        half = white[head] & ((columns[head] > 44) if on_the_right else (columns[head] < 35))
        assert made.lesion[head][half].float().mean() > 0.9
    difference = (made.images - healthy.images).transpose(0, 1)[:, made.lesion].mean(1)
    assert difference[0] > 0.1 and difference[1] < -0.1
    assert torch.equal(made.brain, healthy.brain)
    with pytest.raises(ValueError, match="`lesion_masks` must hold a mask for each of the 2 heads, .* got 3"):
        slices(maps, 2, lesion_masks=masks)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "none.nii.gz")
    with pytest.raises(ValueError, match=r"none.nii.gz must be a volume with lesion, .* got shape \(4, 4, 4\)"):
        read_lesion_masks([tmp_path / "none.nii.gz"])


@pytest.mark.parametrize(
    ("kind", "names"), [("ms", ["ms_patient04", "ms_patient06"]), ("stroke", ["soop_0016", "soop_0039"])]
)
def test_shapes_of_real_lesions_are_put_into_heads(maps, kind, names):
    folder = Path(os.environ.get("ANODIFF_TEST_DATA", "")) / "mri" / "lesion_shapes" / kind
    if "ANODIFF_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("ANODIFF_TEST_DATA names no folder with mri/lesion_shapes")
    files = [folder / f"{name}.nii.gz" for name in names]
    masks, count = read_lesion_masks(files), len(files)
    positions = tuple(float(height) for height in range(-60, 75, 5))
    options = {"positions": positions, "contrasts": ("flair", "t1"), "thickness": None, "samples": 1}
    made, healthy = slices(maps, count, lesion_masks=masks, **options), slices(maps, count, **options)
    for head, path in enumerate(files):
        volume = float(made.lesion[head].sum()) * 2.5 * 2.5 * 5 / 1000
        image = nib.load(path)
        expected = np.count_nonzero(image.dataobj) * abs(np.linalg.det(image.affine)) / 1000
        assert 0.25 * expected < volume < 1.8 * expected, (path.name, volume, expected)
    assert not (made.lesion & ~made.brain).any()
    difference = (made.images - healthy.images).transpose(0, 1)[:, made.lesion & (made.tissues == WHITE)].mean(1)
    assert difference[0] > 0.1 and difference[1] < -0.1


def test_maps_are_read_in_any_orientation(folder, maps, tmp_path):
    image = nib.load(folder / "head_2.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("PIL"))
    nib.save(turned, tmp_path / "turned.mgz")
    other = read_label_maps(tmp_path)
    numbers, keys = torch.zeros(1, dtype=torch.long), make_keys(0, 0, 0)
    options = {"size": (96, 80), "spacing": 2.5}
    first = make_slices(maps, numbers + 2, keys, torch.tensor([[0.0]]), **options)
    second = make_slices(other, numbers, keys, torch.tensor([[0.0]]), **options)
    assert (first.tissues != second.tissues).float().mean() < 0.001


def test_every_label_has_one_tissue():
    labels = [label for own in LABELS.values() for label in own]
    assert len(labels) == len(set(labels)) and set(LABELS) | {"air"} == set(TISSUES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: np.where(labels == 3, 7777, labels), r"one.nii.gz holds labels .* known here: \[7777\]"),
        (lambda labels: labels + 0.5, "one.nii.gz must be a segmentation, one whole number >= 0 per voxel"),
        (lambda labels: labels - 5, "one.nii.gz must be a segmentation, one whole number >= 0 per voxel"),
        (lambda labels: np.stack([labels, labels], -1), "one.nii.gz must be a segmentation"),
        (lambda labels: np.where(labels < 500, 0, labels), "one.nii.gz holds no label of the brain"),
    ],
)
def test_what_is_no_label_map_is_named(tmp_path, change, message):
    image = head()
    nib.save(
        nib.Nifti1Image(change(np.asarray(image.dataobj)).astype(np.float32), image.affine), tmp_path / "one.nii.gz"
    )
    with pytest.raises(ValueError, match=message):
        read_label_maps(tmp_path)


@pytest.mark.parametrize("read", [read_label_maps, lambda folder: read_lesion_masks([folder / "one.nii.gz"])])
def test_a_damaged_map_is_named(tmp_path, read):
    nib.save(head(), tmp_path / "one.nii.gz")
    read(tmp_path)
    content = (tmp_path / "one.nii.gz").read_bytes()
    (tmp_path / "one.nii.gz").write_bytes(content[:-8])  # all voxels are there, not their checksum
    with pytest.raises(ValueError, match="one.nii.gz cannot be read, it may be truncated or damaged"):
        read(tmp_path)


def test_a_folder_without_maps(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no label maps"):
        read_label_maps(tmp_path)


@pytest.fixture
def coarse(monkeypatch):
    """Volumes of heads with a quarter of the pixels; returns their size in mm."""
    monkeypatch.setattr(head_files, "HEAD_SIZE", (88, 64))
    monkeypatch.setattr(head_files, "HEAD_SPACING", 3.0)
    return 3.0


def test_a_data_set_of_heads(folder, tmp_path, coarse):
    write_heads(tmp_path / "raw", folder, subjects=2, tested=4, contrasts=("t1", "flair"), progress=False)
    lists = {
        split: (tmp_path / "raw" / "splits" / f"{split}.csv").read_text().split()[1:] for split in ("train", "test")
    }
    assert [name.split("_")[0] for name in lists["test"]] == ["healthy", *LESIONS]
    used = {}
    for split, names in lists.items():
        for name in names:
            record = json.loads((tmp_path / "raw" / name / "head.json").read_text())
            used.setdefault(split, set()).add(record["map"])
            lesion, brain = (
                np.asarray(nib.load(tmp_path / "raw" / name / f"{kind}.nii.gz").dataobj)
                for kind in ("lesion", "brain")
            )
            assert lesion.any() == (record["lesion"] is not None) and not (lesion & ~brain).any()
            image = nib.load(tmp_path / "raw" / name / "t1.nii.gz")
            assert image.header.get_zooms()[0] == coarse and not np.asarray(image.dataobj)[brain == 0].any()
    # What is learnt of a map is not tested on it.
    assert not used["train"] & used["test"]
    with pytest.raises(FileExistsError, match="exists"):
        write_heads(tmp_path / "raw", folder, subjects=2)


@pytest.mark.usefixtures("coarse")
def test_heads_are_prepared(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"subjects": 1, "tested": 2, "contrasts": ("t1", "t2"), "progress": False}
    assert prepare_heads(folder, "set", **options) == {}
    train, test = load_prepared("set", "train"), load_prepared("set", "test")
    assert train.modalities == ("t1", "t2") and (train.labels == 0).all() and (test.labels == 1).any()
    assert is_phantom(train.recipe) and str(tmp_path) not in str(train.recipe)
    assert set(os.listdir()) == {"cache", "set"}


def test_options_of_heads(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--contrast", "pd"], "`contrast` must be one of flair, t1, t2, any, got 'pd'"),
        (["--contrast", "t1", "--contrast", "t1"], "`contrasts` must be different, got t1, t1"),
        (["--subjects", "0"], "`subjects` must be an integer of at least 1, got 0"),
        (["--phantom", "phantom-mini"], "Give `--phantom` or `--heads`, not both"),
    ):
        with pytest.raises(ValueError, match=message):
            preprocess(["--heads", str(folder), "--out", "set", *arguments])
    assert not os.path.exists("set")


# Label maps that need no folder


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("builtin") / "maps"
    write_head_maps(folder, 2, spacing=4.0, progress=False)
    return folder


def test_a_built_in_map_is_a_head(builtin):
    first, second = (nib.load(path) for path in sorted(builtin.iterdir()))
    labels = np.asarray(first.dataobj)
    assert not np.array_equal(labels, np.asarray(second.dataobj))
    litres = {label: (labels == label).sum() * 0.064 / 1000 for label in np.unique(labels).tolist()}
    # White matter, cortex, ventricles, cerebellum; nuclei and brain stem; fluid outside, skull and skin.
    assert 0.4 < litres[2] + litres[41] < 0.8 and 0.5 < litres[3] + litres[42] < 0.95
    assert 0.005 < litres[4] + litres[43] < 0.08 and 0.08 < litres[8] + litres[47] < 0.18
    assert {10, 49, 11, 50, 12, 51, 16, 24, 506, 508, 511, 515} <= set(litres)
    places = nib.affines.apply_affine(first.affine, np.argwhere(labels == 2)), np.argwhere(labels == 41)
    assert places[0][:, 0].mean() < -15 and nib.affines.apply_affine(first.affine, places[1])[:, 0].mean() > 15
    # Nowhere does brain touch the air.
    brain, air = np.isin(labels, [*range(2, 24), *range(25, 86)]), labels == 0
    for axis in range(3):
        for step in (-1, 1):
            assert not (brain & np.roll(air, step, axis))[1:-1, 1:-1, 1:-1].any()


def test_heads_of_built_in_maps(builtin, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sets, "write_head_maps", lambda path, *_, **__: made.append(shutil.copytree(builtin, path)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = ["--heads", "builtin", "--contrast", "t1", "--subjects", "1", "--tested", "0"]
    for name, skull in (("a", "false"), ("b", "true")):
        where = ["--out", str(tmp_path / name), "--root", str(tmp_path / f"raw-{name}"), "--skull", skull]
        assert preprocess([*arguments, *where]) == 0
    assert len(made) == 1 and is_phantom(load_prepared(tmp_path / "a", "train").recipe)
    heads = [
        {name: nib.load(tmp_path / f"raw-{raw}/healthy_00000/{name}.nii.gz").get_fdata() for name in ("t1", "brain")}
        for raw in "ab"
    ]
    np.testing.assert_array_equal(*(head["brain"] for head in heads))
    outside = heads[0]["brain"] == 0
    assert (heads[0]["t1"][outside] == 0).all() and heads[1]["t1"][outside].max() > 300
    np.testing.assert_array_equal(*(head["t1"][~outside] for head in heads))
    assert sum(1 for _ in (tmp_path / "raw-a").glob("*_0000?")) == 1
