"""Synthetic brains with synthetic lesions: a data set that needs no download, no licence and no patient.

The phantom shows that a method is correct: the error falls, AUROC rises with `contrast`, two runs agree. It cannot
support a claim of accuracy, because all subjects share the gyral pattern of one template and one simulated scanner.
"""

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.special import expit
from tqdm.auto import tqdm

from ...checks import check_choice, check_integer, check_number
from ...files import making_folder, write_json
from ..smooth_fields import smooth_field


# X, Y, Z voxels of the grid (RAS), V voxels inside the brain, mm are RAS millimetres of the template.

MODALITIES = ("t1", "t2", "flair")
ANATOMIES = ("mni152", "geometric")
LESIONS = ("tumour", "ms", "stroke")

TISSUE_MEANS = {"t1": (0.22, 0.55, 0.85), "t2": (1.00, 0.55, 0.38), "flair": (0.12, 0.62, 0.50)}  # CSF, GM, WM
TISSUE_TEXTURE = (0.020, 0.030, 0.025)  # CSF, GM, WM
LESION_MEANS = {"t1": 0.38, "t2": 0.80, "flair": 0.92}
CORE_MEANS = {"t1": 0.25, "t2": 0.95, "flair": 0.45}
DISPLACEMENT = ((60.0, 3.0), (28.0, 1.5), (14.0, 0.6))  # knot spacing and standard deviation, mm

# Seed of the data sets: with it the tumours and strokes of phantom-mini's validation and test splits have 2 to 29 ml,
# so that they can be seen at 64 pixels; with others some have less than a millilitre.
SET_SEED = 11

# Number of subjects per split and kind, `None` is healthy: volume-level AUROC needs healthy ones in every test.
PHANTOM_SETS = {
    "phantom-mini": {
        "train": ((None, 16),),
        "validation": ((None, 4), ("tumour", 2), ("ms", 1), ("stroke", 1)),
        "test": ((None, 4), ("tumour", 2), ("ms", 1), ("stroke", 1)),
    },
    "phantom-std": {
        "train": ((None, 200),),
        "validation": ((None, 20), ("tumour", 10), ("ms", 5), ("stroke", 5)),
        "test": ((None, 20), ("tumour", 20), ("ms", 10), ("stroke", 10)),
    },
}

_MAX_DRAWS = 50  # of a shape or a lesion that is rejected
_MIN_LESION_ML = 0.05


@dataclass(frozen=True)
class PhantomSubject:
    """
    Holds one synthetic subject.

    Args:
        name: Kind and index, for example `"healthy_0003"` or `"tumour_0020"`.
        images: Modality (`"t1"`, `"t2"`, `"flair"`) to float32 volume `(X, Y, Z)`, about 0 to 1.6, 0 outside the
            brain.
        brain (`np.ndarray` of shape `(X, Y, Z)`): uint8, 1 inside the brain.
        lesion (`np.ndarray` of shape `(X, Y, Z)`): uint8, 0 healthy, 1 lesion, 2 necrotic core of a tumour. Non-zero
            exactly where `soft_lesion > 0.5`.
        soft_lesion (`np.ndarray` of shape `(X, Y, Z)`): float32 in [0, 1], the weight with which lesion intensities
            were mixed into the images.
        affine (`np.ndarray` of shape `(4, 4)`): Voxel to RAS millimetres.
        parameters: JSON-able: arguments, every drawn parameter and `lesion_volume_ml`.
    """

    name: str
    images: dict[str, np.ndarray]
    brain: np.ndarray
    lesion: np.ndarray
    soft_lesion: np.ndarray
    affine: np.ndarray
    parameters: dict

    def save(self, folder: str | Path) -> None:
        """Writes `t1.nii.gz`, `t2.nii.gz`, `flair.nii.gz` (int16, value x 1000, no scale factor in the header),
        `brain.nii.gz`, `lesion.nii.gz` (uint8) and `phantom.json` (`parameters`) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        volumes = {name: np.round(image * 1000).astype(np.int16) for name, image in self.images.items()}
        volumes |= {"brain": self.brain, "lesion": self.lesion}
        for name, volume in volumes.items():
            image = nib.Nifti1Image(volume, self.affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, folder / f"{name}.nii.gz")
        write_json(folder / "phantom.json", self.parameters)


@dataclass(frozen=True)
class _Template:
    """Holds the average anatomy on a regular RAS grid. `ventricle_distance` and `depth` below the surface, in mm, have
    a grid of their own."""

    gm: np.ndarray
    wm: np.ndarray
    brain: np.ndarray
    spacing: float
    ventricle_distance: np.ndarray
    depth: np.ndarray
    distance_spacing: float
    origin: np.ndarray  # (3,) mm
    extent: np.ndarray  # (3,) mm from the first to the last voxel centre
    centre: np.ndarray  # (3,) mm


def _make_template(gm, wm, brain, spacing, origin, stride):
    brain = (brain > 0.5).astype(np.float32)
    gm, wm = gm * brain, wm * brain
    total = np.maximum(gm + wm, 1.0)
    gm, wm = gm / total, wm / total

    coarse = np.s_[::stride, ::stride, ::stride]
    inside = np.pad(brain[coarse] > 0, 1)  # the field of view may cut the brain stem: the cut is surface too
    depth = ndimage.distance_transform_edt(inside, spacing * stride)[1:-1, 1:-1, 1:-1]
    # Fluid more than 20 mm below the surface is ventricle or cistern; the largest part is the lateral ventricles.
    fluid = ((1 - gm - wm)[coarse] > 0.5) & (depth > 20.0)
    labels, _ = ndimage.label(fluid)
    ventricles = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    ventricle_distance = ndimage.distance_transform_edt(~ventricles, spacing * stride)
    return _Template(
        gm=gm,
        wm=wm,
        brain=brain,
        spacing=spacing,
        ventricle_distance=ventricle_distance.astype(np.float32),
        depth=depth.astype(np.float32),
        distance_spacing=spacing * stride,
        origin=np.asarray(origin, dtype=np.float64),
        extent=(np.array(brain.shape) - 1) * spacing,
        centre=origin + spacing * np.array(ndimage.center_of_mass(brain)),
    )


@lru_cache(maxsize=1)
def _mni152_template() -> _Template:
    """Reads the ICBM152 2009a tissue maps at 1 mm, from nilearn's wheel (no download)."""
    try:
        from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
    except ImportError as error:
        raise ImportError(
            '`anatomy="mni152"` takes its tissue maps from nilearn: pip install "anodiff[phantom]", '
            'or use `anatomy="geometric"`.'
        ) from error
    loaders = (load_mni152_gm_template, load_mni152_wm_template, load_mni152_brain_mask)
    maps = [load(resolution=1) for load in loaders]
    arrays = [image.get_fdata(dtype=np.float32) for image in maps]
    return _make_template(*arrays, 1.0, maps[2].affine[:3, 3], stride=2)


@lru_cache(maxsize=1)
def _geometric_template() -> _Template:
    """Makes nested deformed ellipsoids on 64 x 76 x 60 voxels of 3 mm: CSF rim, folded GM shell, WM, ventricles."""
    shape, spacing = (64, 76, 60), 3.0
    origin = -spacing * (np.array(shape) - 1) / 2
    axes = [(o + spacing * np.arange(n)).astype(np.float32) for o, n in zip(origin, shape, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")

    def inner_distance(centre, semi_axes):  # mm below the surface of an ellipsoid, nearly
        radius = np.sqrt(sum(((p - c) / a) ** 2 for p, c, a in zip((x, y, z), centre, semi_axes, strict=True)))
        return (1 - radius) * np.mean(semi_axes)

    depth = inner_distance((0, 0, 0), (68, 84, 62))
    folds = (
        np.sin(x / 5.5 + 1.5 * np.sin(y / 17))
        + np.sin(y / 5 + 1.5 * np.sin(z / 15))
        + np.sin(z / 5.5 + 1.5 * np.sin(x / 13))
    )
    ventricles = np.maximum(*(inner_distance((side * 13, 4, 6), (8, 32, 13)) for side in (-1, 1)))
    csf = np.maximum(expit(2 + 1.5 * folds - depth), expit(ventricles))
    wm = (1 - csf) * expit((depth - 13 - 3 * folds) / 1.5)
    return _make_template(1 - csf - wm, wm, (depth > 0).astype(np.float32), spacing, origin, stride=1)


@dataclass(frozen=True)
class _Grid:
    """Holds the output's voxels. Knots are counted over `extent`: smooth fields do not depend on `spacing`."""

    shape: tuple[int, int, int]
    spacing: float
    origin: np.ndarray
    extent: np.ndarray

    def positions(self) -> list[np.ndarray]:
        """Returns the coordinates of all voxels in mm as three float32 arrays that broadcast to `(X, Y, Z)`."""
        axes = [o + self.spacing * np.arange(n) for o, n in zip(self.origin, self.shape, strict=True)]
        return np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij", sparse=True)


def _smooth_field(rng, grid, knot_spacing):
    return smooth_field(rng, grid.shape, [grid.spacing] * 3, grid.extent, knot_spacing)


def _jacobian_determinant(source, spacing):
    """Returns the determinant of the derivative of a map, `source (3, X, Y, Z)` in mm, on a grid of `spacing` mm."""
    (a, b, c), (d, e, f), (g, h, i) = (np.gradient(component, spacing) for component in source)
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _draw_shape(rng, grid, template):
    """Draws where the subject's voxels lie in the template, `(3, X, Y, Z)` in mm; rejects maps that nearly fold."""
    for draw in range(1, _MAX_DRAWS + 1):
        matrix = (np.eye(3) + rng.normal(0, 0.03, (3, 3))) @ np.diag(rng.uniform(0.95, 1.05, 3))
        offsets = [position - np.float32(c) for position, c in zip(grid.positions(), template.centre, strict=True)]
        source = np.empty((3, *grid.shape), dtype=np.float32)
        for component, row, c in zip(source, matrix.astype(np.float32), template.centre, strict=True):
            component[:] = row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2] + np.float32(c)
            for knot_spacing, std in DISPLACEMENT:
                component += np.float32(std) * _smooth_field(rng, grid, knot_spacing)
        smallest = float(_jacobian_determinant(source, grid.spacing).min())
        if smallest > 0.2:
            return source, {"affine_map": matrix.tolist(), "smallest_jacobian": smallest, "shape_draws": draw}
    raise RuntimeError(
        f"No valid shape in {_MAX_DRAWS} draws: the Jacobian determinant was 0.2 or less somewhere in each."
    )


def _sample(volume, spacing, template, source):
    """Interpolates `volume` linearly (0 outside its grid) at `source (3, ...)` in mm."""
    index = np.stack([(s - np.float32(o)) / np.float32(spacing) for s, o in zip(source, template.origin, strict=True)])
    return ndimage.map_coordinates(volume, index, output=np.float32, order=1, mode="constant")


@dataclass(frozen=True)
class _Anatomy:
    """Holds a subject without lesion and scanner, at its V voxels inside the brain."""

    brain: np.ndarray  # (X, Y, Z) bool
    positions: np.ndarray  # (3, V) mm
    source: np.ndarray  # (3, V) mm, where the voxels lie in the template
    modulation: np.ndarray  # (3, V) by which CSF, GM and WM are wider or narrower
    texture: np.ndarray  # (V,)
    means: dict[str, np.ndarray]  # modality to intensities of CSF, GM, WM
    sharpness: float
    parameters: dict

    def tissue_weights(self, template, source):
        """Returns the weights of CSF, GM, WM `(3, V)`, which sum to 1, of what lies at `source` in the template."""
        gm, wm = (_sample(volume, template.spacing, template, source) for volume in (template.gm, template.wm))
        fractions = np.stack([np.maximum(1 - gm - wm, 0), gm, wm])
        weights = fractions ** np.float32(self.sharpness) * self.modulation
        return weights / weights.sum(axis=0)


def _draw_anatomy(rng, grid, template):
    # 1. Shape
    source, parameters = _draw_shape(rng, grid, template)
    brain = _sample(template.brain, template.spacing, template, source) > 0.5

    # 2. Tissue: the power undoes the blur of the average, the fields vary the width of cortex and sulci.
    sharpness, atrophy = rng.uniform(1.6, 2.4), rng.uniform(0.7, 1.8)
    modulation = np.stack([np.exp(np.float32(0.35) * _smooth_field(rng, grid, 10.0)[brain]) for _ in range(3)])
    modulation[0] *= np.float32(atrophy)

    # 3. Contrast of the modalities
    texture = _smooth_field(rng, grid, 6.0)[brain]
    means = {m: np.multiply(TISSUE_MEANS[m], 1 + rng.normal(0, 0.04, 3)) for m in MODALITIES}
    parameters |= {
        "sharpness": sharpness,
        "atrophy": atrophy,
        "tissue_means": {m: mean.tolist() for m, mean in means.items()},
    }
    positions = np.stack([np.broadcast_to(p, grid.shape)[brain] for p in grid.positions()])
    return _Anatomy(brain, positions, source[:, brain], modulation, texture, means, sharpness, parameters)


def _ellipsoidal_radius(rng, positions, centre, semi_axes):
    """Returns the distance from `centre` in units of the randomly turned semi-axes, `(V,)`."""
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    scaled = (rotation / np.asarray(semi_axes)[:, None]).astype(np.float32)
    offset = positions - centre[:, None].astype(np.float32)
    return np.sqrt(sum((row[0] * offset[0] + row[1] * offset[1] + row[2] * offset[2]) ** 2 for row in scaled))


def _draw_tumour(rng, positions, weights, smoothed_wm, shape_field):
    candidates = np.flatnonzero(smoothed_wm > 0.5)
    centre = positions[:, candidates[rng.integers(candidates.size)]]
    semi_axes = rng.uniform(4, 20) * rng.uniform(0.7, 1.3, 3)
    sharpness = rng.uniform(6, 14)
    has_core = bool(rng.random() < 0.6 and semi_axes.mean() > 8)  # small ones look like a target
    radius = _ellipsoidal_radius(rng, positions, centre, semi_axes)
    # Grey matter is infiltrated later than white matter: without this a tumour looks pasted over the cortex.
    d = radius * (1 + np.float32(0.3) * weights[1]) + np.float32(0.22) * shape_field
    soft = expit((1 - d) * np.float32(sharpness))
    core = expit((0.5 - d) * np.float32(2 * sharpness)) if has_core else np.zeros_like(d)
    where = {"centre_mm": centre.tolist(), "semi_axes_mm": semi_axes.tolist()}
    parameters = {**where, "edge": sharpness, "core": has_core}
    return soft, core, parameters


def _draw_ms(rng, positions, weights, ventricle_distance, shape_field):
    near = np.exp(-ventricle_distance / 8.0)
    probability = np.where((weights[2] > 0.5) & (ventricle_distance > 0), near, 0.0).astype(np.float64)
    count = int(rng.integers(5, 41))
    centres = rng.choice(probability.size, count, replace=False, p=probability / probability.sum())
    edge = rng.uniform(3, 7)
    soft = np.zeros_like(shape_field)
    radii = rng.uniform(1.5, 5, count)
    for centre, radius in zip(positions[:, centres].T, radii, strict=True):
        semi_axes = radius * rng.uniform(0.7, 1.3, 3)
        d = _ellipsoidal_radius(rng, positions, centre, semi_axes) + np.float32(0.22) * shape_field
        soft = np.maximum(soft, expit((1 - d) * np.float32(edge)))
    parameters = {"centres_mm": positions[:, centres].T.tolist(), "radii_mm": radii.tolist(), "edge": edge}
    return soft, np.zeros_like(soft), parameters


def _draw_stroke(rng, positions, weights, depth, offset, brain_centre, shape_field):
    """Draws a wedge in one hemisphere: an ellipsoid below the cortex, cut by a plane from the cortex inwards."""
    side, _, height = offset  # mm in the template from the centre of the brain
    # The cortex of the convexity; at the base, cerebellum and brain stem are near the surface too.
    candidates = np.flatnonzero((weights[1] > 0.5) & (depth < 12) & (np.abs(side) > 12) & (height > -10))
    chosen = candidates[rng.integers(candidates.size)]
    outward = positions[:, chosen] - brain_centre
    outward /= np.linalg.norm(outward)
    mean_radius = rng.uniform(12, 28)
    semi_axes = mean_radius * rng.uniform(0.7, 1.3, 3)
    centre = positions[:, chosen] - rng.uniform(0.2, 0.6) * mean_radius * outward
    normal = np.cross(outward, rng.standard_normal(3))
    normal /= np.linalg.norm(normal)
    normal = normal + rng.uniform(0, 0.5) * outward  # tilted, so that the wedge is wider at the cortex
    shift = rng.uniform(0.1, 0.5)
    edge = rng.uniform(6, 14)
    radius = _ellipsoidal_radius(rng, positions, centre, semi_axes)
    beyond_plane = np.tensordot(normal, positions - centre[:, None], axes=1) / mean_radius + shift
    d = (np.maximum(radius, 1 - beyond_plane) + 0.22 * shape_field).astype(np.float32)
    same_hemisphere = expit(np.sign(side[chosen]) * side)
    soft = expit((1 - d) * np.float32(edge)) * same_hemisphere
    where = {"centre_mm": centre.tolist(), "semi_axes_mm": semi_axes.tolist()}
    parameters = {**where, "plane_normal": normal.tolist(), "plane_shift": shift, "edge": edge}
    return soft, np.zeros_like(soft), parameters


def _draw_lesion(kind, rng, grid, template, anatomy, weights):
    """Draws a lesion: soft lesion `(V,)`, soft core `(V,)`, parameters. Draws again after a lesion of less than 0.05
    ml, for example a small one that fell into a sulcus."""
    brain, positions, source = anatomy.brain, anatomy.positions, anatomy.source
    for draw in range(1, _MAX_DRAWS + 1):
        # Two scales: a lesion of a few mm would be a perfect ellipsoid with the coarse one alone.
        shape_field = (0.8 * _smooth_field(rng, grid, 14.0) + 0.6 * _smooth_field(rng, grid, 6.0))[brain]
        if kind == "tumour":
            wm = np.zeros(grid.shape, dtype=np.float32)
            wm[brain] = weights[2]
            smoothed_wm = ndimage.gaussian_filter(wm, 4.0 / grid.spacing)[brain]
            soft, core, parameters = _draw_tumour(rng, positions, weights, smoothed_wm, shape_field)
        elif kind == "ms":
            distance = _sample(template.ventricle_distance, template.distance_spacing, template, source)
            soft, core, parameters = _draw_ms(rng, positions, weights, distance, shape_field)
        else:
            depth = _sample(template.depth, template.distance_spacing, template, source)
            offset = source - template.centre[:, None].astype(np.float32)
            soft, core, parameters = _draw_stroke(rng, positions, weights, depth, offset, template.centre, shape_field)
        volume = float((_keep_out_of_csf(soft, weights) > 0.5).sum()) * grid.spacing**3 / 1000
        if volume >= _MIN_LESION_ML:
            return soft, core, parameters | {"draws": draw}
    raise RuntimeError(f'No `lesion="{kind}"` of {_MIN_LESION_ML} ml or more in {_MAX_DRAWS} draws.')


def _keep_out_of_csf(soft, weights):
    # Before the mask is derived, so that image and mask agree about sulci and ventricles.
    return soft * np.where(weights[0] > 0.6, np.float32(0.3), np.float32(1.0))


def _draw_images(rng, grid, anatomy, weights, lesion, contrast):
    """Draws what the scanner sees: the images `(X, Y, Z)` of all modalities, 0 outside the brain, and their noise
    levels. `lesion` is `None` or soft lesion `(V,)`, soft core `(V,)` and, per modality, the intensities of both."""
    brain, texture = anatomy.brain, anatomy.texture
    brain_blurred = ndimage.gaussian_filter(brain.astype(np.float32), 0.45)[brain]
    images, noise_levels = {}, {}
    for m in MODALITIES:
        image = sum(
            w * (np.float32(mu) + np.float32(sd) * texture)
            for w, mu, sd in zip(weights, anatomy.means[m], TISSUE_TEXTURE, strict=True)
        )
        if lesion is not None:
            soft, core, means = lesion
            outer, inner = (np.float32(mean) for mean in means[m])
            target = outer + core * (inner - outer) + np.float32(0.05) * texture
            # A fifth of the local contrast stays: tissue shines through a lesion.
            target = target + np.float32(0.2) * (image - np.float32(anatomy.means[m][1]))
            image = image + np.float32(contrast) * soft * (target - image)
        noise_levels[m] = float(rng.uniform(0.01, 0.03))
        bias = np.exp(np.float32(0.10) * _smooth_field(rng, grid, 90.0)[brain])
        noise = np.float32(noise_levels[m]) * rng.standard_normal((2, image.size), dtype=np.float32)
        images[m] = np.zeros(grid.shape, dtype=np.float32)
        images[m][brain] = image * bias
        # The point spread: divided by the blurred mask, so that the zeros outside do not darken the rim.
        blurred = ndimage.gaussian_filter(images[m], 0.45)[brain] / brain_blurred
        images[m][brain] = np.hypot(blurred + noise[0], noise[1])  # Rician
    return images, noise_levels


def make_subject(
    index: int,
    *,
    seed: int = 0,
    lesion: str | None = None,
    spacing: float = 2.0,
    anatomy: str = "mni152",
    contrast: float = 1.0,
) -> PhantomSubject:
    """
    Makes one synthetic subject with T1, T2 and FLAIR images.

    Anatomy, lesion and scanner draw from separate streams of `SeedSequence([seed, index])`: the same index gives the
    same subject whatever else is made, and subjects that differ only in `lesion` or `contrast` share
    anatomy and noise, so that their difference is the lesion. Bit for bit the same on one machine.

    Args:
        index: Which subject, 0 or more.
        seed: Which data set, 0 or more.
        lesion: `"tumour"` (an irregular blob of 4 to 20 mm radius, often with a necrotic core if larger than 8 mm),
            `"ms"` (5 to 40 blobs of 1.5 to 5 mm near the ventricles) or `"stroke"` (a wedge that reaches the cortex of
            one hemisphere). `None` is healthy.
        spacing: Voxel size in mm, 1 to 8.
        anatomy: `"mni152"` deforms the tissue maps of ICBM152 2009a and needs nilearn; `"geometric"` deforms nested
            ellipsoids, for fast tests.
        contrast: Contrast of the lesion in [0, 1]: 0 leaves the healthy image, 1 gives full lesion intensities. The
            mask does not depend on it.
    """
    check_integer("index", index, 0)
    check_integer("seed", seed, 0)
    check_choice("lesion", lesion, (None, *LESIONS))
    check_choice("anatomy", anatomy, ANATOMIES)
    check_number("spacing", spacing, least=1, most=8)
    check_number("contrast", contrast, least=0, most=1)
    template = _mni152_template() if anatomy == "mni152" else _geometric_template()
    shape = tuple(int(n) for n in template.extent // spacing + 1)
    grid = _Grid(shape, float(spacing), template.origin, template.extent)
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    scanner_rng, lesion_rng = rng.spawn(2)

    # 1. Anatomy and lesion
    subject = _draw_anatomy(rng, grid, template)
    weights = subject.tissue_weights(template, subject.source)
    soft, drawn, parameters, lesion_means = np.zeros(weights.shape[1], dtype=np.float32), None, None, None
    if lesion is not None:
        soft, core, parameters = _draw_lesion(lesion, lesion_rng, grid, template, subject, weights)
        soft = _keep_out_of_csf(soft, weights)
        lesion_means = {
            m: [float(mean[m] * (1 + lesion_rng.normal(0, 0.06))) for mean in (LESION_MEANS, CORE_MEANS)]
            for m in MODALITIES
        }
        drawn = soft, core, lesion_means

    # 2. Images
    images, noise_levels = _draw_images(scanner_rng, grid, subject, weights, drawn, contrast)

    # 3. Ground truth
    mask = np.zeros(grid.shape, dtype=np.uint8)
    mask[subject.brain] = soft > 0.5
    if lesion is not None:
        mask[subject.brain] += (soft > 0.5) & (core > 0.5)
    soft_lesion = np.zeros(grid.shape, dtype=np.float32)
    soft_lesion[subject.brain] = soft

    affine = np.diag([grid.spacing] * 3 + [1.0])
    affine[:3, 3] = grid.origin
    parameters = {
        **{"seed": int(seed), "index": int(index), "anatomy": anatomy, "spacing": grid.spacing, "lesion": lesion},
        **{"contrast": float(contrast), **subject.parameters, "noise": noise_levels},
        "lesion_parameters": parameters,
        "lesion_means": lesion_means,
        "lesion_volume_ml": float(np.count_nonzero(mask) * grid.spacing**3 / 1000),
    }
    name = f"{lesion or 'healthy'}_{index:04d}"
    return PhantomSubject(name, images, subject.brain.astype(np.uint8), mask, soft_lesion, affine, parameters)


def draw_tissues(index: int, *, spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Draws the healthy anatomy of a subject, as [`make_subject`] does with `anatomy="mni152"`, without any image.

    Returns:
        Which tissue prevails in the V voxels of the brain, `(V,)`: 0 CSF, 1 GM, 2 WM; the brain `(X, Y, Z)`, bool;
        where its voxels lie in the template, `(3, V)` in mm; and the affine from voxels to RAS millimetres.
    """
    check_integer("index", index, 0)
    check_number("spacing", spacing, least=1, most=8)
    template = _mni152_template()
    shape = tuple(int(n) for n in template.extent // spacing + 1)
    grid = _Grid(shape, float(spacing), template.origin, template.extent)
    subject = _draw_anatomy(np.random.default_rng([SET_SEED, index]), grid, template)
    # The average has filled sulci and thick cortex, which the images of partial volumes bear and a label does not.
    weights = subject.tissue_weights(template, subject.source) * np.float32([[2.2], [1.0], [1.3]])
    tissues = weights.argmax(0)
    affine = np.diag([grid.spacing] * 3 + [1.0])
    affine[:3, 3] = grid.origin
    return tissues, subject.brain, subject.source, affine


def write_phantom(
    folder: str | Path,
    name: str = "phantom-mini",
    *,
    seed: int = SET_SEED,
    anatomy: str = "mni152",
    spacing: float = 2.0,
    progress: bool = True,
) -> None:
    """
    Writes a whole data set: one folder per subject (see [`PhantomSubject.save`]) and the subject lists
    `splits/train.csv`, `splits/validation.csv`, `splits/test.csv` (header `subject`). Training subjects are healthy.

    The subjects are made in `.NAME.partial` beside `folder` and renamed at the end: an interrupted run leaves no
    half-made data set, and the next one removes what it left. `folder` must not exist; `seed`, `anatomy` and `spacing`
    are as in [`make_subject`].
    """
    folder = Path(folder)
    check_choice("name", name, PHANTOM_SETS)
    if folder.exists():
        raise FileExistsError(f"`folder` {folder} exists: choose another one or delete it first.")
    kinds = [(split, lesion) for split, counts in PHANTOM_SETS[name].items() for lesion, n in counts for _ in range(n)]
    with making_folder(folder) as unfinished:
        subjects = {split: [] for split in PHANTOM_SETS[name]}
        for index, (split, lesion) in enumerate(tqdm(kinds, desc=name, unit="subject", disable=not progress)):
            subject = make_subject(index, seed=seed, lesion=lesion, spacing=spacing, anatomy=anatomy)
            subject.save(unfinished / subject.name)
            subjects[split].append(subject.name)
        (unfinished / "splits").mkdir()
        for split, names in subjects.items():
            with open(unfinished / "splits" / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([["subject"], *([n] for n in names)])
