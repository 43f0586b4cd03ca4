"""Registers and corrects a subject before the processor sees it: skull stripping, a template's space, the brain's box,
bias field, histograms. Needs SimpleITK (the extra `preprocess`)."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lazy_loader
import nibabel as nib
import numpy as np

from ..checks import check_choice, check_integer
from ..files import sha256
from ..volumes.scans import find_scans
from ..volumes.volume import InputVolume, read_volume
from .readers.subjects import Subject


if TYPE_CHECKING:
    import SimpleITK as sitk
else:
    sitk = lazy_loader.load("SimpleITK")  # an extra; `Correction.check` says if it is missing

# Arrays are (X, Y, Z), affines lead to RAS+ as in nibabel; ITK's world is LPS, and its arrays run backwards.

STRIPPERS = {"anodiff": "anodiff", "hd-bet": "hd-bet", "synthstrip": "mri_synthstrip"}
TRANSFORMS = ("rigid", "affine")

_INSTALL = {
    "anodiff": "`pip install anodiff` puts it beside Python: is its folder in PATH?",
    "hd-bet": "`pip install hd-bet`",
    "synthstrip": "it comes with FreeSurfer: https://surfer.nmr.mgh.harvard.edu/docs/synthstrip/",
}
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SEED = 1  # 0 is the clock for SimpleITK
_SAMPLES = 30_000  # voxels of the template that a registration looks at
_N4_LEVELS, _N4_TOLERANCE, _N4_SHRINK = 4, 5e-4, 4  # as the authors of cDDPM call ANTs


@dataclass(frozen=True)
class Correction:
    """
    Corrects a subject's volume, in this order: skull stripping, registration and resampling (one interpolation), cut,
    bias field, histograms. The grid that comes out is the subject's grid from then on, with its right affine; masks
    are brought there by nearest neighbours, images linearly. Modalities may come on different grids, but must lie on
    each other in the world.

    Args:
        skull_strip: `"anodiff"`, `"hd-bet"` or `"synthstrip"`, the program that makes the brain mask of the modality
            `by`; outside it everything is 0 then.
        register: `"rigid"` or `"affine"`: the modality `by` to the template, by mutual information.
        by: Modality that brain and registration are found in; the first by default.
        spacing: Voxel size of the new grid in mm along its axes; the template's, or without one the subject's, by
            default. To reduce a volume without aliasing use `spacing` of the processor.
        cut: Cut the grid to the box of the brain.
        n4: N4 bias field correction in the brain: iterations at each of four levels. cDDPM and SADM 200.
        match_histogram: Match every modality to that of the reference scan, as ANDi: SimpleITK, 256 levels, one point,
            above the mean.
        template: File of `register`; should be stripped if subjects are.
        reference: Of `match_histogram`: a file, or a folder with one per modality, called after it.
        modalities: Names of the channels, in order.
    """

    skull_strip: str | None = None
    register: str | None = None
    by: str | None = None
    spacing: tuple[float, float, float] | None = None
    cut: bool = False
    n4: int = 0
    match_histogram: bool = False
    template: str | Path | None = None
    reference: str | Path | None = None
    modalities: tuple[str, ...] = ("image",)

    def __post_init__(self):
        check_choice("correction.skull_strip", self.skull_strip, (None, *STRIPPERS))
        check_choice("correction.register", self.register, (None, *TRANSFORMS))
        check_choice("correction.by", self.by, (None, *self.modalities))
        check_integer("correction.n4", self.n4, 0)
        if self.spacing is not None and (
            len(self.spacing) != 3 or not all(isinstance(mm, (int, float)) and mm > 0 for mm in self.spacing)
        ):
            raise ValueError(f"`correction.spacing` must be three numbers > 0 in mm, got {self.spacing!r}.")

    @classmethod
    def rules(cls) -> list[str]:
        """Returns the names of what a recipe may set: no files, whose paths differ between machines."""
        names = [field.name for field in dataclasses.fields(cls)]
        return [name for name in names if name not in ("template", "reference", "modalities")]

    def check(self) -> None:
        """Raises an `ImportError` if SimpleITK or the program of `skull_strip` is missing, a `ValueError` if a file is
        not given, or is given and not used."""
        try:
            import SimpleITK  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "`correction` of a recipe needs SimpleITK: `pip install anodiff[preprocess]`."
            ) from error
        for rule, wanted, name, path in (
            ("register", self.register is not None, "template", self.template),
            ("match_histogram", self.match_histogram, "reference", self.reference),
        ):
            if wanted and path is None:
                raise ValueError(f"`correction.{rule}` needs a {name}: give `--{name} FILE`.")
            if path is not None and not wanted:
                raise ValueError(f"`--{name}` is given, but the recipe does not set `correction.{rule}`.")
        if self.skull_strip is not None and shutil.which(STRIPPERS[self.skull_strip]) is None:
            others = [name for name in STRIPPERS if shutil.which(STRIPPERS[name])]
            raise ImportError(
                f"`correction.skull_strip: {self.skull_strip}` needs the program `{STRIPPERS[self.skull_strip]}`,"
                f" which is not installed ({_INSTALL[self.skull_strip]}). Installed are {', '.join(others) or 'none'}."
            )

    def describe(self) -> dict:
        """Returns the rules that are set, and the files by name and SHA-256, in plain values."""
        defaults = type(self)()
        described = {
            name: getattr(self, name) for name in self.rules() if getattr(self, name) != getattr(defaults, name)
        }
        if self.spacing is not None:
            described["spacing"] = list(self.spacing)
        if self.template is not None:
            described["template"] = _fingerprint(Path(self.template))
        if self.reference is not None:
            described["reference"] = [_fingerprint(file) for file in self._reference_files().values()]
        return described

    def apply(self, subject: Subject, picture: Path) -> tuple[Subject, dict]:
        """
        Corrects one subject. Returns it with corrected volumes ([`InputVolume`]) in place of its files, and its row of
        `corrections.csv`; `picture` is a PNG file to write: three planes with the contours of brain and masks.

        Raises a `ValueError` if the files do not fit together, or ITK or the program gives up on them.
        """
        # The order of sums, and with it the last bits, would depend on threads: `num_proc` shares out subjects.
        threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        try:
            return self._apply(subject, picture)
        except RuntimeError as error:  # what ITK raises, with its own source lines in front
            reason = str(error).strip().rpartition("\n")[2]
            raise ValueError(f"Subject {subject.name}: the correction failed: {reason}") from error
        finally:
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)

    def _apply(self, subject: Subject, picture: Path) -> tuple[Subject, dict]:
        # 1. Everything into ITK's images, each on its own grid.
        images, masks, given = self._read_images(subject)
        by = images[self.by or self.modalities[0]]
        row = {"input_shape": list(by.GetSize()), "input_spacing": _rounded(by.GetSpacing())}
        lesion_before = [_millilitres(mask, subject.mask_above) for mask in masks]

        # 2. The brain, and where it is in the template.
        if self.skull_strip is not None:
            given = self._strip(by)
        brain = by
        if given is not None:
            brain = sitk.Resample(given, by, sitk.Transform(), sitk.sitkNearestNeighbor)
        brain = sitk.Cast(brain > 0, sitk.sitkUInt8)
        row |= {"skull_strip": self.skull_strip or "", "register": self.register or ""}
        row |= dict.fromkeys(("metric", "rotation_degrees", "volume_ratio", "shift_mm", "matrix"), "")
        grid, transform, template = by, sitk.Transform(), None
        if self.register is not None:
            grid = template = _image(*_read_one(Path(self.template)))
            moving = by if given is None else sitk.Mask(by, brain)
            transform, metric = _register(template, moving, self.register)
            row |= {"metric": round(metric, 4), **_describe_transform(transform, template)}

        # 3. One grid for all.
        grid, brain = self._new_grid(subject.name, grid, brain, transform)
        images = {name: sitk.Resample(image, grid, transform, sitk.sitkLinear) for name, image in images.items()}
        masks = [sitk.Resample(mask, grid, transform, sitk.sitkNearestNeighbor) for mask in masks]
        lesion_after = [_millilitres(mask, subject.mask_above) for mask in masks]
        for path, before, after in zip(subject.masks, lesion_before, lesion_after, strict=True):
            if before > 0 and after == 0:
                raise ValueError(
                    f"Nothing of the {before} ml that {path} marks is left on the new grid: look at the registration,"
                    " the box (`cut`) and the voxel size."
                )
        if self.skull_strip is not None:
            images = {name: sitk.Mask(image, brain) for name, image in images.items()}

        # 4. Intensities.
        images, described = self._correct_intensities(images, brain)
        row |= described

        # 5. Back, and what was done.
        row |= {"output_shape": list(grid.GetSize()), "output_spacing": _rounded(grid.GetSpacing())}
        row |= {"brain_ml": _millilitres(brain, 0), "lesion_ml": lesion_before, "lesion_ml_after": lesion_after}
        affine, inside = _affine(grid), _array(brain) > 0
        row["overlap_with_template"], beneath = "", None
        if template is not None:
            beneath = _array(sitk.Resample(template, grid, sitk.Transform(), sitk.sitkLinear))
            common = (inside & (beneath > 0)).sum()
            row["overlap_with_template"] = round(2 * common / (inside.sum() + (beneath > 0).sum()), 4)
        arrays = {name: _array(image) for name, image in images.items()}
        marks = [_array(mask) for mask in masks]
        marked = np.any([mark > subject.mask_above for mark in marks], axis=0)
        _draw(picture, subject.name, affine, arrays[self.by or self.modalities[0]], beneath, inside, marked)
        volume = InputVolume(arrays, affine, None, False, 3, subject.name)
        found = tuple(_volume(mark, affine, str(path)) for mark, path in zip(marks, subject.masks, strict=True))
        kept = None if given is None else _volume(inside.astype(np.float32), affine, f"brain of {subject.name}")
        return dataclasses.replace(subject, volume=volume, masks=found, brain=kept), row

    def _read_images(self, subject: Subject) -> tuple[dict, list, sitk.Image | None]:
        """Reads the modalities, the masks and the brain mask if there is one."""
        images = {name: _image(*volume) for name, volume in self._read(subject).items()}
        masks = [_image(*_read_one(mask)) for mask in subject.masks]
        brain = None if subject.brain is None else _image(*_read_one(subject.brain))
        for path, mask in zip((*subject.masks, subject.brain), (*masks, brain), strict=True):
            # A mask with a wrong affine would be moved away from its lesion without a word.
            if mask is not None and not any(
                mask.GetSize() == image.GetSize() and np.allclose(_affine(mask), _affine(image), atol=1e-3)
                for image in images.values()
            ):
                raise ValueError(
                    f"The mask {path} must lie on the grid of one of {', '.join(images)}: shape and affine."
                )
        return images, masks, brain

    def _new_grid(self, name: str, grid: sitk.Image, brain: sitk.Image, transform) -> tuple:
        """Returns the grid that everything is brought to, with the brain on it."""
        if self.spacing is not None:  # over the same field of view, about the same centre
            size, old = np.array(grid.GetSize()), np.array(grid.GetSpacing())
            count = np.maximum(np.rint(size * old / self.spacing), 1).astype(int)
            first = (size - 1) / 2 - (count - 1) / 2 * self.spacing / old  # in voxels of the old grid
            new = sitk.Image(count.tolist(), sitk.sitkFloat32)
            new.SetSpacing([float(mm) for mm in self.spacing])
            new.SetDirection(grid.GetDirection())
            new.SetOrigin(grid.TransformContinuousIndexToPhysicalPoint(first.tolist()))
            grid = new
        brain = sitk.Resample(brain, grid, transform, sitk.sitkNearestNeighbor)
        if not sitk.GetArrayViewFromImage(brain).any():
            raise ValueError(f"Subject {name}: nothing of the brain is left on the new grid.")
        if self.cut:
            indices = np.nonzero(sitk.GetArrayViewFromImage(brain).T)
            low = [int(index.min()) for index in indices]
            size = [int(np.ptp(index) + 1) for index in indices]
            grid, brain = (sitk.RegionOfInterest(image, size, low) for image in (grid, brain))
        return grid, brain

    def _correct_intensities(self, images: dict, brain: sitk.Image) -> tuple[dict, dict]:
        """Returns the images with bias field and histograms corrected, and what `corrections.csv` says of that."""
        row = {"n4_field": "", "matched_to": ""}
        if self.n4:
            corrected = {name: _correct_bias(image, brain, self.n4) for name, image in images.items()}
            images = {name: image for name, (image, _) in corrected.items()}
            row["n4_field"] = [field for _, field in corrected.values()]
        if self.match_histogram:
            references = self._reference_files()
            for name, image in images.items():
                matched = sitk.HistogramMatching(
                    image, _image(*_read_one(references[name])), 256, 1, True
                )  # ANDi's call
                images[name] = sitk.Mask(matched, image != 0)
            row["matched_to"] = [file.name for file in references.values()]
        return images, row

    def _read(self, subject: Subject) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Reads array and affine of every modality."""
        if isinstance(subject.volume, dict):
            volumes = {name: _read_one(file) for name, file in subject.volume.items()}
        else:
            volume = read_volume(subject.volume)
            if volume.is_picture:
                raise ValueError(f"{volume.name} is a picture, and `correction` is for volumes.")
            names = self.modalities if len(volume.arrays) == len(self.modalities) else volume.arrays
            volumes = {name: (array, volume.affine) for name, array in zip(names, volume.arrays.values(), strict=True)}
        if set(volumes) != set(self.modalities):
            raise ValueError(
                f"Subject {subject.name} must have the modalities {', '.join(self.modalities)}, it has"
                f" {', '.join(volumes)}."
            )
        if self.register is None and self.spacing is None:
            read_volume(subject.volume)  # raises if the modalities lie on different grids: nothing would unite them
        return volumes

    def _reference_files(self) -> dict[str, Path]:
        scans, failed = find_scans([str(self.reference)], list(self.modalities))
        if len(scans) != 1:  # what else lies beside it does not matter
            raise ValueError(
                f"`reference` {self.reference} must be one scan with the modalities {', '.join(self.modalities)}"
                f"{': ' + failed[0][1] if failed and not scans else f', got {len(scans)} scans.'}"
            )
        volume = scans[0].volume
        if isinstance(volume, dict):
            return volume
        if len(self.modalities) != 1:
            raise ValueError(
                f"`reference` {self.reference} is one file: give a folder with {', '.join(self.modalities)}."
            )
        return {self.modalities[0]: Path(volume)}

    def _strip(self, image: sitk.Image) -> sitk.Image:
        """Returns the brain mask that the program makes."""
        import torch

        gpu = torch.cuda.is_available()
        with tempfile.TemporaryDirectory() as folder:
            source, brain = Path(folder) / "scan.nii.gz", Path(folder) / "out" / "scan.nii.gz"
            brain.parent.mkdir()
            nib.save(nib.Nifti1Image(_array(image), _affine(image)), source)
            if self.skull_strip == "anodiff":
                mask = brain.with_name("scan_brain_mask.nii.gz")
                command = ["anodiff", "strip", source, "-o", brain.parent]
            elif self.skull_strip == "hd-bet":
                mask = brain.with_name("scan_bet.nii.gz")
                command = ["hd-bet", "-i", source, "-o", brain, "--save_bet_mask", "-device", "cuda" if gpu else "cpu"]
                command += [] if gpu else ["--disable_tta"]
            else:
                mask = brain.with_name("mask.nii.gz")
                command = ["mri_synthstrip", "-i", source, "-o", brain, "-m", mask, *(["-g"] if gpu else [])]
            done = subprocess.run(
                [str(part) for part in command], capture_output=True, encoding="utf-8", errors="replace"
            )
            if done.returncode or not mask.is_file():
                said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
                raise ValueError(f"`{command[0]}` made no brain mask (exit status {done.returncode}): {said}")
            array, affine = _read_one(mask)
            if array.shape != image.GetSize() or not array.any():
                raise ValueError(
                    f"`{command[0]}` made a brain mask of shape {array.shape} with {int((array > 0).sum())} voxels for"
                    f" a volume of shape {image.GetSize()}."
                )
        return _image((array > 0).astype(np.float32), _affine(image))


def _fingerprint(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    return f"{file.name} (SHA-256 {sha256(file)[:16]})"


def _read_one(source) -> tuple[np.ndarray, np.ndarray]:
    volume = read_volume(source)
    if volume.is_picture or len(volume.arrays) != 1:
        raise ValueError(f"{volume.name} must be a volume of one channel for `correction`.")
    return next(iter(volume.arrays.values())), volume.affine


def _image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    world = _LPS @ affine
    spacing = np.linalg.norm(world[:3, :3], axis=0)
    direction = world[:3, :3] / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-3:
        raise ValueError(
            "The affine has shear, which ITK's images cannot have: resample the volume to a straight grid first."
        )
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T, dtype=np.float32))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(world[:3, 3].tolist())
    image.SetDirection(direction.ravel().tolist())
    return image


def _array(image: sitk.Image) -> np.ndarray:
    return np.ascontiguousarray(sitk.GetArrayFromImage(image).T, dtype=np.float32)


def _affine(image: sitk.Image) -> np.ndarray:
    world = np.eye(4)
    world[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    world[:3, 3] = image.GetOrigin()
    return _LPS @ world


def _volume(array: np.ndarray, affine: np.ndarray, name: str) -> InputVolume:
    return InputVolume({"": array}, affine, None, False, 3, name)


def _millilitres(image: sitk.Image, above: float) -> float:
    count = int((sitk.GetArrayViewFromImage(image) > above).sum())
    return round(count * float(np.prod(image.GetSpacing())) / 1000, 3)


def _rounded(values) -> list[float]:
    return [round(float(value), 6) for value in values]


def _register(fixed: sitk.Image, moving: sitk.Image, kind: str) -> tuple[sitk.Transform, float]:
    """Returns the transform that leads points of `fixed` to those of `moving`, and the (negative) mutual information.

    Centres of mass, then rigid, then affine, each at a quarter and at half of the template's resolution. With one
    thread and the fixed seed it gives the same bits every time.
    """
    transform = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    metric = 0.0
    for step in TRANSFORMS[: TRANSFORMS.index(kind) + 1]:
        if step == "affine":
            affine = sitk.AffineTransform(3)
            affine.SetMatrix(transform.GetMatrix())
            affine.SetCenter(transform.GetCenter())
            affine.SetTranslation(transform.GetTranslation())
            transform = affine
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.REGULAR)
        voxels = fixed.GetNumberOfPixels()
        method.SetMetricSamplingPercentagePerLevel(
            [min(1.0, _SAMPLES * shrink**3 / voxels) for shrink in (4, 2)], _SEED
        )
        method.SetShrinkFactorsPerLevel([4, 2])
        method.SetSmoothingSigmasPerLevel([2.0, 1.0])
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-2, 100, gradientMagnitudeTolerance=1e-6)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, inPlace=True)
        method.Execute(fixed, moving)
        metric = method.GetMetricValue()
    return transform, metric


def _describe_transform(transform, grid: sitk.Image) -> dict:
    """Returns the matrix from template world to subject world (RAS+, mm), and in numbers what it does."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    rotation, scales, other = np.linalg.svd(matrix[:3, :3])
    angle = np.degrees(np.arccos(np.clip((np.trace(rotation @ other) - 1) / 2, -1, 1)))
    centre = np.array(grid.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in grid.GetSize()]))
    shift = np.linalg.norm(np.array(transform.TransformPoint(centre.tolist())) - centre)
    return {
        "rotation_degrees": round(float(angle), 3),
        "volume_ratio": round(float(np.prod(scales)), 4),
        "shift_mm": round(float(shift), 3),
        "matrix": _rounded((_LPS @ matrix @ _LPS).ravel()),
    }


def _correct_bias(image: sitk.Image, brain: sitk.Image, iterations: int) -> tuple[sitk.Image, list[float]]:
    """Returns the corrected image, and the least and greatest value of the field that was taken out of the brain."""
    shrink = [max(1, min(_N4_SHRINK, size // 8)) for size in image.GetSize()]
    method = sitk.N4BiasFieldCorrectionImageFilter()
    method.SetMaximumNumberOfIterations([iterations] * _N4_LEVELS)
    method.SetConvergenceThreshold(_N4_TOLERANCE)
    method.Execute(sitk.Shrink(image, shrink), sitk.Shrink(brain, shrink))
    field = sitk.Exp(method.GetLogBiasFieldAsImage(image))
    inside = _array(field)[_array(brain) > 0]
    corrected = sitk.Cast(image / field, sitk.sitkFloat32)  # a quotient has 64 bits, which histogram matching refuses
    return corrected, [round(float(inside.min()), 4), round(float(inside.max()), 4)]


def _draw(path: Path, title: str, affine: np.ndarray, image: np.ndarray, template, brain, mask) -> None:
    """Draws the axial, coronal and sagittal plane through the middle of the lesion (without one, of the brain), in
    radiological convention; the template (an array or `None`) beneath, with the same contours."""
    from matplotlib.figure import Figure

    def canonical(array):
        return nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.float32), affine))

    zooms = canonical(image).header.get_zooms()
    layers = {"brain": canonical(brain).get_fdata(), "mask": canonical(np.broadcast_to(mask, brain.shape)).get_fdata()}
    middle = np.median(np.argwhere(layers["mask" if mask.any() else "brain"]), axis=0).astype(int)
    rows = {title: canonical(image).get_fdata()}
    if template is not None:
        rows["template"] = canonical(template).get_fdata()
    figure = Figure(figsize=(9.6, 3.3 * len(rows)), dpi=100, facecolor="black", layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, (name, array) in zip(axes, rows.items(), strict=True):
        low, high = 0.0 if array.min() >= 0 else float(array.min()), float(np.quantile(array, 0.998))
        for place, across, up, axis in zip((0, 1, 2), (0, 0, 1), (1, 2, 2), line, strict=True):
            cut = 2 - place

            def plane(volume, cut=cut, across=across):
                flat = np.take(volume, middle[cut], axis=cut).T
                return flat[:, ::-1] if across == 0 else flat  # the patient's right is on the left

            axis.imshow(
                plane(array), cmap="gray", vmin=low, vmax=high, origin="lower", aspect=zooms[up] / zooms[across]
            )
            for layer, colour in (("brain", "tab:cyan"), ("mask", "red")):
                if plane(layers[layer]).any() and not plane(layers[layer]).all():
                    axis.contour(plane(layers[layer]), [0.5], colors=colour, linewidths=0.9)
            axis.set_axis_off()
            if across == 0:
                axis.text(0.02, 0.5, "R", color="white", transform=axis.transAxes)
        line[0].set_title(name, color="white", fontsize=9, loc="left")
    figure.savefig(path, metadata={"Software": None})
