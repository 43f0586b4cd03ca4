"""A phantom of pictures with several annotations, whose raters are known: something like lung nodules in CT."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from scipy import ndimage
from scipy.special import expit
from tqdm.auto import tqdm

from ...checks import check_choice, check_integer
from ...files import making_folder, write_json
from ..smooth_fields import smooth_field
from .brains import SET_SEED


# A raters, H x W pixels, both _SIZE.

# Patients and pictures of each.
RATER_SETS = {"phantom-raters": (320, 2)}

_SIZE = 64
_MIDDLE = (_SIZE - 1) / 2


@dataclass(frozen=True)
class RaterCase:
    """
    Holds one picture of the phantom and its annotations.

    Args:
        name: Patient and picture, for example `"patient_0003_1"`.
        patient: Whose picture it is.
        image (`np.ndarray` of shape `(H, W)`): uint8.
        masks (`np.ndarray` of shape `(A, H, W)`): uint8, 0 or 1, one annotation per rater, perhaps empty.
        parameters: JSON-able. `overlooked`, `with_halo` and `with_satellite` are the probabilities that a rater leaves
            the picture empty, and that one who does not includes the halo or the satellite.
    """

    name: str
    patient: str
    image: np.ndarray
    masks: np.ndarray
    parameters: dict

    def save(self, folder: str | Path) -> None:
        """Writes `image.png`, `label0.png`, ... (0 and 255) and `phantom.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(self.image).save(folder / "image.png")
        for number, mask in enumerate(self.masks):
            PIL.Image.fromarray(mask * np.uint8(255)).save(folder / f"label{number}.png")
        write_json(folder / "phantom.json", self.parameters)


@dataclass(frozen=True)
class _Nodule:
    """Describes what a picture shows: pixels, radians, contrasts on the grey scale from 0 to 1."""

    row: float
    column: float
    radius: float
    harmonics: tuple[tuple[float, float], ...]  # amplitude and phase of the boundary's 2nd, 3rd, ... harmonic
    edge: float
    contrast: float
    halo: float  # width beside the radius where it is widest, 0 for none
    halo_contrast: float  # of the nodule's
    halo_angle: float
    satellite: float  # radius, 0 for none
    satellite_distance: float
    satellite_angle: float

    def depths(self, rows: np.ndarray, columns: np.ndarray) -> dict[str, np.ndarray]:
        """Returns how many pixels inside the boundary of each part that is there these places lie, negative
        outside."""
        y, x = rows - self.row, columns - self.column
        distance, angle = np.hypot(y, x), np.arctan2(y, x)
        waves = [a * np.cos(k * (angle - phase)) for k, (a, phase) in enumerate(self.harmonics, 2)]
        boundary = self.radius * (1 + sum(waves))
        depths = {"core": boundary - distance}
        if self.halo:
            widened = boundary + self.halo * np.exp(2.0 * (np.cos(angle - self.halo_angle) - 1))
            depths["halo"] = widened - distance
        if self.satellite:
            y = y - self.satellite_distance * math.sin(self.satellite_angle)
            x = x - self.satellite_distance * math.cos(self.satellite_angle)
            depths["satellite"] = self.satellite - np.hypot(y, x)
        return depths


def _draw_nodule(seed: int, patient: int, picture: int) -> _Nodule:
    """Draws the patient's nodule, as the section `picture` shows it."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, patient]))
    radius = rng.uniform(5, 11)
    contrast = rng.uniform(0.10, 0.60)
    has_halo, has_satellite = rng.random(2) < (0.6, 0.4)
    nodule = {
        "row": _MIDDLE + rng.uniform(-8, 8),
        "column": _MIDDLE + rng.uniform(-8, 8),
        "radius": radius,
        "harmonics": tuple((rng.normal(0, 0.10 / k), rng.uniform(0, 2 * np.pi)) for k in range(1, 5)),
        "edge": rng.uniform(0.4, 1.0),
        "contrast": contrast,
        "halo": radius * rng.uniform(0.4, 0.8),
        "halo_contrast": rng.uniform(0.25, 0.65),
        "halo_angle": rng.uniform(0, 2 * np.pi),
        "satellite": rng.uniform(2.0, 3.5),
        "satellite_distance": radius * 1.3 + rng.uniform(5.0, 8.0),
        "satellite_angle": rng.uniform(0, 2 * np.pi),
    }
    nodule["halo"] *= has_halo
    nodule["satellite"] *= has_satellite
    for name in ("radius", "halo", "satellite"):
        nodule[name] = float(nodule[name] * 0.85**picture)
    return _Nodule(**nodule)


def _draw_section(seed: int, patient: int, picture: int, nodule: _Nodule) -> np.ndarray:
    """Draws the picture `(H, W)` uint8: the nodule with the tissue around it."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, patient, picture]))
    rows, columns = np.indices((_SIZE, _SIZE), dtype=np.float64)
    image = 0.22 + 0.04 * _pixel_field(rng, 14) + 0.02 * _pixel_field(rng, 5)
    for _ in range(rng.integers(3, 7)):  # vessels
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-30, 30)
        bend = rng.uniform(2, 5) * _pixel_field(rng, 30)
        across = (rows - _MIDDLE) * np.cos(angle) - (columns - _MIDDLE) * np.sin(angle) - offset + bend
        image = np.maximum(image, rng.uniform(0.3, 0.55) * np.exp(-0.5 * (across / rng.uniform(0.7, 1.4)) ** 2))
    depths = nodule.depths(rows, columns)
    strengths = {"core": 1.0, "halo": nodule.halo_contrast, "satellite": 0.8}
    shown = [strengths[part] * expit(depth / nodule.edge) for part, depth in depths.items()]
    image = image + nodule.contrast * np.max(shown, axis=0)
    image = ndimage.gaussian_filter(image, 0.5) + rng.uniform(0.01, 0.03) * rng.standard_normal((_SIZE, _SIZE))
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def make_case(patient: int, picture: int = 0, *, seed: int = SET_SEED, num_raters: int = 4) -> RaterCase:
    """
    Makes one picture, something like a CT section with a lung nodule, and annotations that differ for reasons that one
    can see in it:

    - A faint nodule is overlooked by some raters, who leave the picture empty.
    - A nodule may have a halo on one side, of lower contrast: each rater takes it for a part of it or not.
    - It may have a satellite, which each rater marks or not.
    - Each rater draws somewhat wider or narrower than others, and with an unsteady hand.

    The raters' choices are independent of each other, and their probabilities follow from the picture: so the
    frequency of an annotation is known (make many raters), and a method can learn it.

    The nodule is the patient's; further pictures of it are taken farther from its centre. The first raters do not
    depend on how many follow.
    """
    check_integer("patient", patient, 0)
    check_integer("picture", picture, 0)
    check_integer("seed", seed, 0)
    check_integer("num_raters", num_raters, 1)
    nodule = _draw_nodule(seed, patient, picture)
    image = _draw_section(seed, patient, picture, nodule)

    # The raters. What is faint is overlooked, what is conspicuous is not.
    rows, columns = np.indices((_SIZE, _SIZE), dtype=np.float64)
    overlooked = 0.7 * float(expit((0.20 - nodule.contrast) / 0.04))
    with_halo = float(np.interp(nodule.halo_contrast, (0.25, 0.65), (0.25, 0.75))) if nodule.halo else 0.0
    with_satellite = 0.6 if nodule.satellite else 0.0
    masks = np.zeros((num_raters, _SIZE, _SIZE), dtype=np.uint8)
    for rater, mask in enumerate(masks):
        rng = np.random.default_rng(np.random.SeedSequence([seed, patient, picture, rater]))
        sees, takes_halo, takes_satellite = rng.random(3) < (1 - overlooked, with_halo, with_satellite)
        wider = 0.6 * rng.standard_normal()
        unsteady = [0.5 * _pixel_field(rng, 8) for _ in range(2)]
        depths = nodule.depths(rows + unsteady[0], columns + unsteady[1])
        marked = depths["core"] + wider > 0
        if takes_halo:
            marked |= depths["halo"] + wider > 0
        if takes_satellite:
            marked |= depths["satellite"] + wider > 0
        mask[:] = marked & sees
    name = f"patient_{patient:04d}"
    probabilities = {"overlooked": overlooked, "with_halo": with_halo, "with_satellite": with_satellite}
    parameters = {"seed": int(seed), "patient": int(patient), "picture": int(picture)}
    return RaterCase(f"{name}_{picture}", name, image, masks, parameters | probabilities | asdict(nodule))


def _pixel_field(rng: np.random.Generator, knot_spacing: float) -> np.ndarray:
    return smooth_field(rng, (_SIZE, _SIZE), (1.0, 1.0), (_SIZE - 1.0, _SIZE - 1.0), knot_spacing)


def write_rater_phantom(folder: str | Path, name: str = "phantom-raters", *, progress: bool = True) -> None:
    """
    Writes a whole data set: one folder per picture (see [`RaterCase.save`]), and `patients.csv` with the columns
    `case` and `patient`, so that a split keeps the pictures of a patient together.

    The pictures are made in `.NAME.partial` beside `folder` and renamed at the end: an interrupted run leaves no
    half-made data set, and the next one removes what it left. `folder` must not exist.
    """
    folder = Path(folder)
    check_choice("name", name, RATER_SETS)
    if folder.exists():
        raise FileExistsError(f"`folder` {folder} exists: choose another one or delete it first.")
    patients, pictures = RATER_SETS[name]
    with making_folder(folder) as unfinished:
        rows = []
        for index in tqdm(range(patients * pictures), desc=name, unit="picture", disable=not progress):
            case = make_case(*divmod(index, pictures))
            case.save(unfinished / case.name)
            rows.append((case.name, case.patient))
        with open(unfinished / "patients.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("case", "patient"), *rows])
