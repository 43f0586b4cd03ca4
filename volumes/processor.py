"""From a volume to the slices a network sees, and back onto the volume's own grid."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Collection, Mapping

import numpy as np
import scipy.ndimage
import torch
from diffusers.configuration_utils import register_to_config

from ..checks import check_choices, check_integer, check_keys, check_number
from ..files import check_name
from ..hub.configuration import PlainConfigMixin
from .geometry import PLANES, Geometry, plane_orientation
from .volume import InputVolume, check_voxels, read_volume


INTENSITY_RULES = (
    "percentile",
    "slice_minmax",
    "brain_percentiles",
    "brain_median",
    "mean_std",
    "mean_std_no_offset",
    "given",
)
BRAIN_RULES = ("nonzero", "given", "none")
RESIZE_RULES = ("fit", "stretch", "torchio")

# Where `intensity="brain_median"` puts the median of the brain in [0, 1]. What is twice as bright and more is clipped:
# remnants of eyes and scalp in a mask are brighter than lesions, and are not to outweigh them.
BRAIN_LEVEL = 0.5
_FLOW_STEP = 0.125  # of CurvatureFlow
# Shape of an array, whose axes run RAS, that is one slice.
_ONE_SLICE = {"axial": "(X, Y, 1)", "coronal": "(X, 1, Z)", "sagittal": "(1, Y, Z)"}
_NO_BRAIN_LEFT = (
    "{name}: no voxel of the brain is left in the slices. Check the brain mask, and `crop`, `spacing` and `size` of"
    " the processor."
)


@dataclasses.dataclass(frozen=True)
class ProcessedVolume:
    """Holds the slices of one volume, ready for a network.

    Args:
        slices (`torch.Tensor` of shape `(N, C, H, W)`): float32, modalities in the processor's order, in
            `value_range`.
        brain (`torch.Tensor` of shape `(N, H, W)`): bool, where maps count. All `True` without a brain rule.
        geometry: The way back to the input's grid.
        units_offset, units_scale (`np.ndarray` of shape `(N, P)`): `value * scale + offset` is in the input's units,
            of the modalities that the input has, in the processor's order.
        source: The input.
    """

    slices: torch.Tensor
    brain: torch.Tensor
    geometry: Geometry
    units_offset: np.ndarray
    units_scale: np.ndarray
    source: InputVolume


class VolumeProcessor(PlainConfigMixin):
    r"""
    Brings volumes to slices and maps back onto the volume. A component of every checkpoint: what the network has seen
    in training is what it sees at inference.

    The order of steps: smoothing, orientation, intensity rule of the whole volume, spacing, crop, resize (one
    interpolation for all three, linear but for `resize="torchio"`), intensity rule of the slice, clipping, value
    range.

    Args:
        modalities: Names in channel order. A dict is read by name, a 4-D file by position; one modality accepts any
            single image.
        plane: `"axial"`, `"coronal"` or `"sagittal"`: the plane that slices are taken in, in radiological convention.
        spacing: Voxel size in mm along (H, W, slice) that volumes are brought to; `None` keeps the input's.
        crop: `"brain"` cuts slices to the bounding box of the brain; `(H, W)` or `(H, W, N)` cuts or zero-pads about
            the centre, in voxels after `spacing`.
        size: Slice size (H, W) of the network; `None` keeps what the steps before give.
        resize: `"fit"` keeps the aspect ratio and pads with background, `"stretch"` does not. `"torchio"`: as
            `CropOrPad` and `Resample` of torchio do it, in cDDPM and SADM: `crop` has three numbers, the factor from
            it to `size` is that of the slice axis, too, an odd voxel is cut at the low end and not at the high one,
            and images are interpolated by cubic B-splines without antialiasing, which overshoot a little.
        antialias: Widen the linear kernel when reducing (as PIL and `interpolate(antialias=True)`). ANDi does, AnoFPDM
            does not.
        intensity: `"percentile"`: divide by the `quantile` of the voxels > 0 of the volume (ANDi 2.2, AnoFPDM 2.4).
            `"slice_minmax"`: after `"percentile"`, every slice and channel to [0, 1], (x - min) / (max - min + 1e-5)
            (AnoFPDM's loader).
            `"brain_percentiles"`: [1 - `quantile`, `quantile`] of the voxels of the brain mask that `crop` leaves, to
            [0, 1], and clip to that before anything is interpolated (cDDPM and SADM: percentiles 1 and 99).
            `"brain_median"`: divide by twice the median of the voxels > 0 of the brain mask, which becomes 0.5. A
            large lesion moves it far less than an upper quantile.
            `"mean_std"`: clip to [m - s, m + 2s] of the volume, then to [0, 1]. `"mean_std_no_offset"`: AnoDDPM's own
            rule: the same clip, divided by 3s, nothing subtracted; above 1 where m > s.
            `"given"`: `input_range` to [0, 1].
        quantile: Of the rules `"percentile"`, `"slice_minmax"` and `"brain_percentiles"`.
        input_range: Of the rule `"given"`, in the input's units.
        value_range: What [0, 1] becomes in the network.
        clip: Limit values to `value_range`. ANDi's exceed it (`False`).
        brain_mask: `"nonzero"`: where any modality is above `background`, holes filled per slice. `"given"`: a mask
            comes with every volume. `"none"`: the whole slice counts. A mask that is given wins over `"nonzero"`.
        strip: Set voxels outside of the brain mask to 0 first: scans with a skull look as stripped ones do.
        context: Neighbours on either side that the network sees with every slice, as further channels ("2.5-D"); the
            slices themselves do not depend on it. [`~volumes.context.find_neighbours`] says which they are.
        background: Of the rule `"nonzero"`, in the input's units.
        curvature_flow: Smooth every image first, at its own resolution: iterations of SimpleITK's `CurvatureFlow` with
            steps of 0.125. cDDPM and SADM 3. Needs the extra `preprocess`.
    """

    config_name = "processor_config.json"

    @register_to_config
    def __init__(
        self,
        modalities: tuple[str, ...] = ("image",),
        plane: str = "axial",
        spacing: tuple[float | None, float | None, float | None] | None = None,
        crop: str | tuple[int, ...] | None = None,
        size: tuple[int, int] | None = (128, 128),
        resize: str = "fit",
        antialias: bool = True,
        intensity: str = "percentile",
        quantile: float = 0.99,
        input_range: tuple[float, float] = (0.0, 255.0),
        value_range: tuple[float, float] = (-1.0, 1.0),
        clip: bool = True,
        brain_mask: str = "nonzero",
        background: float = 0.0,
        curvature_flow: int = 0,
        strip: bool = False,
        context: int = 0,
    ):
        check_choices(
            self.config, plane=PLANES, resize=RESIZE_RULES, intensity=INTENSITY_RULES, brain_mask=BRAIN_RULES
        )
        # As plain values.
        modalities, spacing, crop, size, input_range, value_range = map(
            self.config.get, ("modalities", "spacing", "crop", "size", "input_range", "value_range")
        )
        if not modalities or isinstance(modalities, str) or len(set(modalities)) != len(modalities):
            raise ValueError(f"`modalities` must be a list of different names, got {modalities!r}.")
        for name in modalities:
            # Results of several pictures are files that are named after them.
            check_name("a modality", name)
            if "/" in name:
                raise ValueError(f"The name of a modality must not hold a slash, got {name!r}.")
        if "brain" in modalities:
            raise ValueError("`modalities` must not contain 'brain': that key of a volume is its brain mask.")
        if spacing is not None:
            if not _is_list(spacing, 3):
                raise ValueError(f"`spacing` must be three numbers > 0 or null, for (H, W, slice), got {spacing!r}.")
            for millimetres in spacing:
                if millimetres is not None:
                    check_number("spacing", millimetres, above=0)
        if crop not in (None, "brain") and not _are_counts(crop, 2, 3):
            raise ValueError(f"`crop` must be 'brain', (H, W), (H, W, N) in whole voxels > 0 or null, got {crop!r}.")
        if size is not None and not _are_counts(size, 2):
            raise ValueError(f"`size` must be two integers > 0, (H, W), or null, got {size!r}.")
        if resize == "torchio" and not (
            _is_list(crop, 3) and _is_list(size, 2) and crop[0] * size[1] == crop[1] * size[0] and crop[0] >= size[0]
        ):
            raise ValueError(
                "`resize` torchio needs `crop` (H, W, N) and a `size` (H, W) that is smaller by the same factor in"
                f" both directions, got {crop!r} and {size!r}."
            )
        # The rule brain_percentiles takes the quantile and its mirror image.
        check_number("quantile", quantile, above=0.5 if intensity == "brain_percentiles" else 0, most=1)
        check_integer("curvature_flow", curvature_flow, 0)
        check_integer("context", context, 0)
        check_number("background", background)
        for name, pair in (("input_range", input_range), ("value_range", value_range)):
            if not _is_list(pair, 2):
                raise ValueError(f"`{name}` must be (low, high) with low < high, got {pair!r}.")
            check_number(name, pair[1])
            check_number(name, pair[0], below=pair[1])

    @classmethod
    def from_dict(cls, settings: dict) -> VolumeProcessor:
        """Builds a processor from plain settings; an unknown key is an error that lists the known ones."""
        known = tuple(inspect.signature(cls.__init__).parameters)[1:]
        check_keys("processor", (key for key in settings if not key.startswith("_")), known, "it")
        return cls(**{key: _tuples(value) for key, value in settings.items() if key in known})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> VolumeProcessor:
        """Loads `processor_config.json` from a folder or a Hub repository; further arguments as in diffusers."""
        return cls.from_dict(cls.load_config(pretrained_model_name_or_path, **kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes `processor_config.json` into a folder."""
        self.save_config(save_directory, **kwargs)

    def to_unit(self, slices: torch.Tensor) -> torch.Tensor:
        """Brings slices from the `value_range` to [0, 1]; values outside of the range stay outside."""
        low, high = self.config.value_range
        return (slices - low) / (high - low)

    def from_unit(self, slices: torch.Tensor) -> torch.Tensor:
        """Brings slices from [0, 1] to the `value_range`: the inverse of `to_unit`."""
        low, high = self.config.value_range
        return slices * (high - low) + low

    @property
    def channels(self) -> int:
        """Returns the number of channels that a network sees: the modalities of a slice and of its neighbours."""
        return len(self.config.modalities) * (2 * self.config.context + 1)

    def middle(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the channels of the slices themselves, `(..., C, H, W)`, of images with those of their neighbours,
        `(..., channels, H, W)`: those of the lowest slice first, of each in the order of the modalities."""
        count = len(self.config.modalities)
        return images[..., self.config.context * count : (self.config.context + 1) * count, :, :]

    def settings(self) -> dict:
        """Returns the settings that decide what slices are, so without `context`, as plain JSON values, which are
        equal before and after saving: they can be compared."""
        return {
            key: _lists(value) for key, value in self.config.items() if not key.startswith("_") and key != "context"
        }

    def check_equal(self, settings: dict, what: str) -> None:
        """Raises a `ValueError` that names every setting in which `what`, with these `settings`, differs."""
        own = self.settings()
        different = [key for key in own if key in settings and _lists(settings[key]) != own[key]]
        if different:
            differences = "; ".join(f"`{key}` is {own[key]!r} there and {settings[key]!r} here" for key in different)
            raise ValueError(
                f"The data was prepared with other settings than {what}: {differences}. Prepare the data again."
            )

    def preprocess(self, volume, brain_mask=None, optional: Collection[str] = ()) -> ProcessedVolume:
        """
        Makes the slices of a volume: a path, nibabel image, `(X, Y)` or `(X, Y, Z)` array or tensor, PIL image,
        [`InputVolume`], or a dict of them by modality (key `"brain"`: the brain mask). A 4-D file holds the modalities
        in the processor's order.

        `brain_mask` is of the same kinds, on the grid of the volume; voxels > 0 are brain. An array has no affine of
        its own and takes the volume's; a picture's is `(rows, columns)`.

        Modalities that are `optional` may be missing, but not all of them: their slices have the lowest value of
        `value_range` everywhere.

        Raises a `ValueError` for a missing or unknown modality, a wrong number of channels, different grids, a
        constant image, an empty brain, or a single slice of another plane.
        """
        volume, brain = self._read(volume, brain_mask, optional)
        self._check_plane(volume)
        arrays = np.stack([volume.arrays[key] for key in volume.arrays])
        if self.config.strip:
            arrays = arrays * brain
        for name, array in zip(volume.arrays, arrays, strict=True):
            if array.min() == array.max():
                raise ValueError(
                    f"{volume.name}: modality `{name}` is constant ({array.min():g}): there is nothing to see in it."
                    " Leave it out, or convert it again from its source."
                )
        if not brain.any():
            raise ValueError(
                f"{volume.name}: the brain mask is empty (rule `{self.config.brain_mask}`). Give a mask, or change"
                " `background`."
            )

        # 1. Intensities of the whole volume: (P, X, Y, Z) to about [0, 1]; offset + scale * value is in its units.
        if self.config.curvature_flow:
            arrays = _curvature_flow(arrays, volume.affine, self.config.curvature_flow)
        geometry = self.geometry(volume.shape, volume.affine, brain)
        arrays, offset, scale = self._volume_intensity(arrays, brain, geometry, volume)

        # 2. Geometry: (P, X, Y, Z) to (N, P, H, W). Padding is background: 0, of the input with "brain_percentiles",
        # and with "mean_std" the darkest value.
        padding = np.zeros(len(arrays), np.float32)
        if self.config.intensity == "mean_std":
            padding = arrays.min((1, 2, 3))
        elif self.config.intensity == "brain_percentiles":
            padding = np.clip(-offset / scale, 0.0, 1.0).astype(np.float32)
        slices = np.stack([geometry.to_network(a - pad) + pad for a, pad in zip(arrays, padding, strict=True)], axis=1)
        network_brain = geometry.to_network(brain, nearest=True)
        if not network_brain.any():
            raise ValueError(_NO_BRAIN_LEFT.format(name=volume.name))

        # 3. Intensities of each slice: offset and scale become (N, P).
        offset = np.broadcast_to(offset, slices.shape[:2]).astype(np.float64)
        scale = np.broadcast_to(scale, slices.shape[:2]).astype(np.float64)
        if self.config.intensity == "slice_minmax":
            low, high = slices.min((2, 3)), slices.max((2, 3))
            slices = (slices - low[..., None, None]) / (high - low + 1e-5)[..., None, None]
            offset, scale = low * scale, (high - low + 1e-5) * scale
        if self.config.clip:
            slices = np.clip(slices, 0.0, 1.0)

        # 4. Value range, and the channels of modalities that are missing: (N, C, H, W).
        low, high = self.config.value_range
        slices = slices * (high - low) + low
        if len(volume.arrays) < len(self.config.modalities):
            given = slices
            slices = np.full((len(given), len(self.config.modalities), *given.shape[2:]), low, np.float32)
            slices[:, self._channels(volume)] = given
        return ProcessedVolume(
            slices=torch.from_numpy(np.ascontiguousarray(slices, dtype=np.float32)),
            brain=torch.from_numpy(network_brain),
            geometry=geometry,
            units_offset=offset - scale * low / (high - low),
            units_scale=scale / (high - low),
            source=volume,
        )

    def preprocess_mask(self, mask, geometry: Geometry) -> np.ndarray:
        """Brings a reference mask on the input's grid (kinds as of a brain mask) to `(N, H, W)` float32, its labels
        kept (nearest neighbour)."""
        labels = _read_mask(mask, geometry.input_shape, geometry.input_affine, "`mask` must lie on the volume's grid")
        return geometry.to_network(labels, nearest=True)

    def postprocess(self, maps: torch.Tensor, processed: ProcessedVolume) -> np.ndarray:
        """Brings maps `(N, H, W)` onto the input's grid, `(X, Y, Z)` float32, linearly; 0 outside the slices."""
        return processed.geometry.to_input(maps.detach().float().cpu().numpy())

    def postprocess_image(self, slices: torch.Tensor, processed: ProcessedVolume) -> np.ndarray:
        """Brings network images `(N, C, H, W)` onto the input's grid in the input's units, those of the P modalities
        that the input has: `(P, X, Y, Z)` float32."""
        values = slices.detach().float().cpu().numpy()[:, self._channels(processed.source)]
        values = values * processed.units_scale[..., None, None] + processed.units_offset[..., None, None]
        return np.stack([processed.geometry.to_input(channel.astype(np.float32)) for channel in values.swapaxes(0, 1)])

    def geometry(self, shape: tuple[int, int, int], affine: np.ndarray, brain: np.ndarray) -> Geometry:
        """Returns the network's grid for an input grid; `brain` `(X, Y, Z)` is used by `crop="brain"` only."""
        orientation = plane_orientation(affine, self.config.plane)
        source_axis = np.argsort(orientation[:, 0])
        extent = np.array([shape[axis] for axis in source_axis], dtype=float)
        zooms = np.linalg.norm(affine[:3, :3], axis=0)[source_axis]

        # In voxels of the reoriented input, axes (W, H, slice): where the field of view begins, its length, its voxel.
        begin, length, step = np.zeros(3), extent.copy(), np.ones(3)
        for axis, millimetres in zip((1, 0, 2), self.config.spacing or (None, None, None), strict=True):
            if millimetres is not None:
                step[axis] = millimetres / zooms[axis]
        if self.config.crop == "brain":
            for axis in (0, 1):
                other = tuple(index for index in range(3) if index != source_axis[axis])
                index = np.flatnonzero(brain.any(axis=other))
                low, high = index[0], index[-1] + 1
                if orientation[source_axis[axis], 1] < 0:
                    low, high = extent[axis] - high, extent[axis] - low
                begin[axis], length[axis] = low, high - low
        count = np.maximum(np.rint(length / step), 1)
        begin += (length - count * step) / 2
        if self.config.crop is not None and self.config.crop != "brain":
            for axis, wanted in zip((1, 0, 2), self.config.crop, strict=False):
                cut = (count[axis] - wanted) // 2
                if self.config.resize == "torchio" and count[axis] > wanted:
                    cut = np.ceil((count[axis] - wanted) / 2)
                begin[axis] += cut * step[axis]
                count[axis] = wanted
        if self.config.resize == "torchio":
            factor = self.config.crop[0] / self.config.size[0]
            step *= factor
            count = np.ceil(count / factor - 1e-6)
        elif self.config.size is not None:
            height, width = self.config.size
            ratio = np.array([count[0] / width, count[1] / height])
            if self.config.resize == "fit":
                # Spacing is physical: pixels that are not square in the input become square in the network.
                pixel = step[:2] * zooms[:2]
                field = count[:2] * pixel
                square = max(field[0] / width, field[1] / height)
                ratio = square / pixel
            for axis, wanted in ((0, width), (1, height)):
                # In whole network pixels: without scaling, padding must not interpolate. 1e-6 is for rounding errors.
                padding = np.floor((wanted - count[axis] / ratio[axis]) / 2 + 1e-6)
                step[axis] *= ratio[axis]
                begin[axis] -= padding * step[axis]
                count[axis] = wanted
        self._check_size(shape, affine, extent, count, step)
        start = begin + step / 2 - 0.5
        return Geometry(
            input_shape=tuple(int(size) for size in shape),
            input_affine=affine,
            plane=self.config.plane,
            start=tuple(start.tolist()),
            step=tuple(step.tolist()),
            network_shape=tuple(int(size) for size in count),
            antialias=self.config.antialias,
            bspline=self.config.resize == "torchio",
        )

    def _check_size(self, shape, affine: np.ndarray, extent: np.ndarray, count: np.ndarray, step: np.ndarray) -> None:
        """Raises a `ValueError` if a grid needs more memory than the limit allows."""
        # What is made on the way: the slices; the input with some axes as long as those of the slices already; weights
        # of the interpolation along one axis, or the field of view in voxels of the input, for B-splines.
        pairs = [(int(has), int(gets)) for has, gets in zip(extent, count, strict=True)]
        slices = math.prod(gets for _, gets in pairs) * len(self.config.modalities)
        field = math.prod(int(voxels) + 2 for voxels in count * step) if self.config.resize == "torchio" else 0
        check_voxels(
            max(slices, math.prod(map(max, pairs)), max(has * gets for has, gets in pairs), field),
            f"A volume of shape {tuple(shape)}, in voxels of {np.linalg.norm(affine[:3, :3], axis=0).tolist()} mm,"
            " brought to the `spacing`, `crop` and `size` of the processor,",
        )

    def _check_plane(self, volume: InputVolume) -> None:
        """Raises a `ValueError` for a picture or a single slice of another plane, of which slices would be lines."""
        axes = {plane: np.argsort(plane_orientation(volume.affine, plane)[:, 0])[2] for plane in PLANES}
        if volume.shape.count(1) != 1 or volume.shape[axes[self.config.plane]] == 1:
            return
        fitting = next(plane for plane in PLANES if volume.shape[axes[plane]] == 1)
        raise ValueError(
            f"{volume.name} cannot be cut into {self.config.plane} slices (`plane`), which would be lines: its shape is"
            f" {volume.shape}, {fitting} by its affine. Choose a checkpoint for that plane; or if it is"
            f" {self.config.plane}, as an array has no affine and a picture counts as axial, give an array of the shape"
            f" {_ONE_SLICE[self.config.plane]}, or NIfTI with the right affine."
        )

    def _channels(self, volume: InputVolume) -> list[int]:
        """Returns the channels of the modalities that a volume has."""
        return [self.config.modalities.index(name) for name in volume.arrays]

    def read(self, volume, optional: Collection[str] = ()) -> InputVolume:
        """Reads a volume, kinds as of [`preprocess`] but without a brain mask, with its modalities in the processor's
        order; raises a `ValueError` for an unknown one, and for a missing one that is not `optional`."""
        volume = read_volume(volume, labels=False)
        modalities = tuple(self.config.modalities)
        if all(key == "" or key.isdigit() for key in volume.arrays):
            if len(volume.arrays) != len(modalities):
                raise ValueError(
                    f"{volume.name} has {len(volume.arrays)} channel(s), this checkpoint needs {len(modalities)}:"
                    f" {', '.join(modalities)}. Give a dict of these names, or a 4-D file in this order."
                    + (f" A dict may lack {_or(optional)}." if optional else "")
                )
            arrays = dict(zip(modalities, volume.arrays.values(), strict=True))
        else:
            present = [name for name in modalities if name in volume.arrays]
            missing = [name for name in modalities if name not in present and not (present and name in optional)]
            unknown = [name for name in volume.arrays if name not in modalities]
            if missing or unknown:
                hint = "Training with `objective.modality_dropout` makes checkpoints that do without some."
                if optional:
                    hint = f"It does without {_or(optional)}, but not without all of its modalities."
                raise ValueError(
                    f"This checkpoint needs the modalities {', '.join(modalities)}; missing:"
                    f" {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}."
                    + (f" {hint}" if missing else "")
                )
            arrays = {name: volume.arrays[name] for name in present}
        return dataclasses.replace(volume, arrays=arrays)

    def _read(self, volume, brain_mask, optional: Collection[str]) -> tuple[InputVolume, np.ndarray]:
        if isinstance(volume, Mapping) and "brain" in volume:
            if brain_mask is not None:
                raise ValueError(
                    "The brain mask is given twice: as `brain_mask` and under the key 'brain'. Leave one out."
                )
            brain_mask = volume["brain"]
            volume = {name: image for name, image in volume.items() if name != "brain"}
        volume = self.read(volume, optional)
        arrays = volume.arrays
        if brain_mask is not None:
            if volume.is_picture and isinstance(brain_mask, (np.ndarray, torch.Tensor)) and brain_mask.ndim == 2:
                brain_mask = brain_mask.T  # (rows, columns), as the results of a picture are
            what = f"The brain mask must lie on the grid of {volume.name}"
            return volume, _read_mask(brain_mask, volume.shape, volume.affine, what) > 0
        if self.config.brain_mask == "given":
            raise ValueError(
                "This checkpoint needs a brain mask: `brain_mask=...`, or the key 'brain' of the volume. `anodiff strip`"
                " makes one, and a pipeline with a `brain_extractor` does so by itself."
            )
        if self.config.brain_mask == "none":
            return volume, np.ones(volume.shape, dtype=bool)
        brain = np.any([array > self.config.background for array in arrays.values()], axis=0)
        slice_axis = int(np.argsort(plane_orientation(volume.affine, self.config.plane)[:, 0])[2])
        filled = [scipy.ndimage.binary_fill_holes(plane) for plane in np.moveaxis(brain, slice_axis, 0)]
        return volume, np.stack(filled, slice_axis)

    def _volume_intensity(
        self, arrays: np.ndarray, brain: np.ndarray, geometry: Geometry, volume: InputVolume
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Applies the rule of the whole volume to `(P, X, Y, Z)`; returns also the offset and scale of each
        modality."""
        rule, name, modalities = self.config.intensity, volume.name, list(volume.arrays)
        offset, scale = np.zeros(len(arrays)), np.ones(len(arrays))
        if rule in ("percentile", "slice_minmax"):
            for index, array in enumerate(arrays):
                positive = array[array > 0]
                if positive.size == 0:
                    raise ValueError(
                        f"{name}: modality `{modalities[index]}` has no value above 0. Add"
                        " a constant to it, so that the background is 0."
                    )
                scale[index] = np.quantile(positive, self.config.quantile)
        elif rule == "brain_median":
            for index, array in enumerate(arrays):
                positive = array[brain & (array > 0)]
                if positive.size == 0:
                    raise ValueError(
                        f"{name}: modality `{modalities[index]}` has no value above 0 in the brain mask."
                        " Look at whether both lie over each other."
                    )
                scale[index] = np.median(positive) / BRAIN_LEVEL
        elif rule == "brain_percentiles":
            width, height, count = geometry.network_shape
            seen = brain & geometry.to_input(np.ones((count, height, width), dtype=bool), nearest=True)
            if not seen.any():
                raise ValueError(_NO_BRAIN_LEFT.format(name=name))
            for index, array in enumerate(arrays):
                low, high = np.quantile(array[seen], (1 - self.config.quantile, self.config.quantile))
                if low == high:
                    raise ValueError(
                        f"{name}: modality `{modalities[index]}` is constant ({low:g}) in the brain mask."
                    )
                offset[index], scale[index] = low, high - low
            arrays = np.clip(arrays, _per_channel(offset), _per_channel(offset + scale))
        elif rule == "given":
            low, high = self.config.input_range
            offset, scale = offset + low, scale * (high - low)
        else:
            mean, std = arrays.mean((1, 2, 3), dtype=np.float64), arrays.std((1, 2, 3), dtype=np.float64)
            arrays = np.clip(arrays, _per_channel(mean - std), _per_channel(mean + 2 * std))
            offset, scale = mean - std if rule == "mean_std" else offset, 3 * std
        return (arrays - _per_channel(offset)) / _per_channel(scale), offset, scale


def _curvature_flow(arrays: np.ndarray, affine: np.ndarray, iterations: int) -> np.ndarray:
    """Returns smoothed images, `(C, X, Y, Z)` float32."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise ImportError(
            "`curvature_flow` of the processor needs SimpleITK: `pip install anodiff[preprocess]`."
        ) from error
    smoothed = []
    for array in arrays:
        image = sitk.GetImageFromArray(array.T)  # its axes run backwards
        image.SetSpacing(np.linalg.norm(affine[:3, :3], axis=0).tolist())
        flowed = sitk.CurvatureFlow(image, timeStep=_FLOW_STEP, numberOfIterations=iterations)
        smoothed.append(sitk.GetArrayFromImage(flowed).T)
    return np.stack(smoothed).astype(np.float32)


def _or(names: Collection[str]) -> str:
    return " or ".join(names)


def _per_channel(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None, None, None]


def _read_mask(mask, shape: tuple[int, int, int], affine: np.ndarray, requirement: str) -> np.ndarray:
    volume = read_volume(mask)
    if len(volume.arrays) != 1:
        raise ValueError(f"{requirement} and be one image, got {len(volume.arrays)} channels.")
    if volume.shape != shape:
        raise ValueError(f"{requirement}: shape {shape}, got {volume.shape}.")
    if not isinstance(mask, (np.ndarray, torch.Tensor)) and not np.allclose(volume.affine, affine, atol=1e-3):
        raise ValueError(
            f"{requirement}: affine {affine.round(3).tolist()}, got {volume.affine.round(3).tolist()}. Resample it"
            " first."
        )
    return next(iter(volume.arrays.values()))


def _is_list(value, *lengths: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) in lengths


def _are_counts(value, *lengths: int) -> bool:
    return _is_list(value, *lengths) and all(isinstance(count, int) and count > 0 for count in value)


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _lists(value):
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
