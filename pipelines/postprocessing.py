"""Post-processing of the anomaly maps of one volume: erosion of the brain and median filter, on the device of the maps,
weights by brightness and removal of small components, on the CPU. Maps are never min-max scaled."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import ndimage

from ..checks import check_choice, check_choices, check_integer
from . import median
from .median import DIMENSIONS


SLICE_SCORES = ("mean", "max", "p99")
FILTER_ORDERS = ("erosion_first", "median_first")
SIGNS = ("both", "brighter", "darker")
WEIGHTINGS = ("none", "intensity")
NORMALIZATIONS = ("none", "healthy_maps")


# N slices of one volume in anatomical order, C modalities, H x W pixels.


@dataclass(frozen=True)
class PostProcessing:
    """
    Holds what happens to the maps of one volume between the method and the result. A checkpoint stores these values in
    its pipeline's configuration; evaluation gives its baselines the same.

    Args:
        median_size (`int`):
            Side of the median filter of the maps in network pixels, 0 for none; see [`median_filter`].
        median_dimensions (`int`): 2 (per slice) or 3.
        erosion (`int`): Network pixels taken from the rim of the brain.
        min_component_size (`int`): Smallest 3-D component of a mask, in network voxels.
        slice_score (`str`): Score of a slice or volume: `"mean"`, `"max"` or `"p99"` of the map in the brain.
        filter_order (`str`):
            Of erosion and median, see [`postprocess_maps`]; an option of cDDPM and its relatives only.
        sign (`str`):
            Where maps count: `"both"` everywhere, `"brighter"` or `"darker"` only where the slice is so, see
            [`brightness_weights`]. Lesions are bright on FLAIR.
        weighting (`str`):
            What maps are multiplied by before they are filtered: `"none"`, or `"intensity"`, the square of how much
            brighter or darker the slice is there, see [`brightness_weights`].
        normalization (`str`):
            What maps are divided by before they are filtered: `"none"`, or `"healthy_maps"`, what healthy slices show
            at the same place: the component of this name, [`~models.healthy_maps.HealthyMapsModel`].
    """

    median_size: int = 0
    median_dimensions: int = 2
    erosion: int = 0
    min_component_size: int = 0
    slice_score: str = "mean"
    filter_order: str = "erosion_first"
    sign: str = "both"
    weighting: str = "none"
    normalization: str = "none"

    def __post_init__(self):
        values = asdict(self)
        check_choices(
            values,
            slice_score=SLICE_SCORES,
            filter_order=FILTER_ORDERS,
            median_dimensions=DIMENSIONS,
            sign=SIGNS,
            weighting=WEIGHTINGS,
            normalization=NORMALIZATIONS,
        )
        for name in ("median_size", "erosion", "min_component_size"):
            check_integer(name, values[name], 0)

    def filter(
        self,
        maps: np.ndarray | torch.Tensor,
        brain: np.ndarray | torch.Tensor,
        added: np.ndarray | torch.Tensor | None = None,
    ) -> np.ndarray | torch.Tensor:
        """Returns filtered maps, `(N, H, W)` float32, 0 outside the brain, on their device. What a method adds to them
        is not filtered, and added in the brain."""
        filtered = postprocess_maps(
            maps,
            brain,
            median_size=self.median_size,
            median_dimensions=self.median_dimensions,
            erosion=self.erosion,
            filter_order=self.filter_order,
        )
        if added is None:
            return filtered
        return filtered + (torch if isinstance(maps, torch.Tensor) else np).where(brain, added, 0)

    def mask(self, maps: np.ndarray, threshold: float, voxels_per_network_voxel: float = 1.0) -> np.ndarray:
        """Returns `maps > threshold` without components that are too small, bool. For maps on another grid than the
        network's, `voxels_per_network_voxel` says how many of their voxels one network voxel is."""
        # Spacings of an affine are rarely exact: 10.000000000000002 voxels are 10.
        min_size = int(np.ceil(self.min_component_size * voxels_per_network_voxel - 1e-6))
        return remove_small_components(maps > threshold, min_size, 3)

    def score(self, maps: np.ndarray, brain: np.ndarray) -> float:
        """Returns the score of all brain pixels of filtered maps; 0 without brain."""
        values = maps[brain]
        if values.size == 0:
            return 0.0
        if self.slice_score == "mean":
            return float(values.mean(dtype=np.float64))
        return float(values.max()) if self.slice_score == "max" else float(np.quantile(values, 0.99))

    def score_slices(self, maps: np.ndarray, brain: np.ndarray) -> np.ndarray:
        """Returns the score of every slice, `(N,)` float64."""
        return np.array([self.score(*pair) for pair in zip(maps, brain, strict=True)])


def brightness_weights(slices: np.ndarray, brain: np.ndarray, sign: str, weighting: str) -> np.ndarray:
    """
    Returns what maps are multiplied by: the squared distance of every pixel from the median of its slice's brain, or
    whether there is one.

    A method may say by its reconstruction what is brighter than it should be, but not every method has one. The median
    is a reference for all of them, and for FLAIR the better one; that of the slice is as good as that of the volume,
    and does not depend on which slices there are (`benchmarks/map_options.py`). The distance is squared as most maps
    are. With several modalities the one with the largest distance counts, so that `"brighter"` means: brighter in at
    least one.

    Args:
        slices (`np.ndarray` of shape `(N, C, H, W)`): Slices in [0, 1].
        brain (`np.ndarray` of shape `(N, H, W)`, boolean): Brain mask; the medians are those of its pixels.
        sign (`str`): `"brighter"`: what is darker than the median has no distance. `"darker"`: what is brighter has
            none. `"both"`: all have one.
        weighting (`str`): `"intensity"`: the squared distance. `"none"`: 1 where there is one, else 0.

    Returns:
        `np.ndarray` of shape `(N, H, W)`, float32, 0 outside the brain.
    """
    weights = np.zeros(brain.shape, np.float32)
    for row in np.flatnonzero(brain.any((1, 2))):
        inside = slices[row][:, brain[row]]  # (C, pixels)
        distance = inside - np.median(inside, axis=1, keepdims=True)
        if sign == "both":
            distance = np.abs(distance)
        elif sign == "darker":
            distance = -distance
        distance = distance.max(0).clip(min=0)
        weights[row][brain[row]] = distance**2 if weighting == "intensity" else distance > 0
    return weights


def median_filter(
    maps: np.ndarray | torch.Tensor, size: int, dimensions: int, *, border: str = "reflect"
) -> np.ndarray | torch.Tensor:
    """
    Filters the maps of one volume by the median of a window.

    Args:
        maps (`np.ndarray` or `torch.Tensor` of shape `(N, H, W)`):
            Anomaly maps, used as float32. Infinite values are values; a window with a NaN gives NaN.
        size (`int`):
            Side of the window in pixels, for example 5. An even window begins `size / 2` pixels before its pixel and
            takes the upper one of the two middle values, as scipy does; UAD-IMAG uses 4.
        dimensions (`int`): 2 for `(size, size)` in each slice, 3 for `(size, size, size)` across slices.
        border (`str`, *optional*, defaults to `"reflect"`):
            How maps continue outside: `"reflect"` repeats the edge (d c b a | a b c d; ANDi and SADM), `"mirror"` does
            not (d c b | a b c d; AnoFPDM).

    Returns:
        of the kind of the maps and on their device: the values of `scipy.ndimage.median_filter`, `(N, H, W)`, float32.
    """
    filtered = median.median_filter(_check_maps(maps), size, dimensions, border=border)
    return filtered if isinstance(maps, torch.Tensor) else filtered.numpy()


def erode_brain(brain: np.ndarray | torch.Tensor, iterations: int) -> np.ndarray | torch.Tensor:
    """
    Returns the brain mask without its rim, eroded in each slice with the 4 neighbours (3 x 3 cross). Zeroing maps
    outside removes the bright rim that reconstructions leave at the edge of the brain. cDDPM uses `H // 25`
    iterations.

    Args:
        brain (`np.ndarray` or `torch.Tensor` of shape `(N, H, W)`, boolean or 0/1):
            Brain mask. What lies outside the image counts as background.
        iterations (`int`): Pixels to remove, 0 for none.

    Returns:
        of the kind of the mask and on its device: `(N, H, W)`, boolean.
    """
    brain = brain.bool() if isinstance(brain, torch.Tensor) else np.asarray(brain, dtype=bool)
    if brain.ndim != 3:
        raise ValueError(f"`brain` must have shape (N, H, W), got {tuple(brain.shape)}.")
    check_integer("iterations", iterations, 0)
    for _ in range(iterations):
        eroded = brain & False
        across = brain[:, :-2, 1:-1] & brain[:, 2:, 1:-1]
        eroded[:, 1:-1, 1:-1] = brain[:, 1:-1, 1:-1] & across & brain[:, 1:-1, :-2] & brain[:, 1:-1, 2:]
        brain = eroded
    return brain


def remove_small_components(mask: np.ndarray, min_size: int, dimensions: int) -> np.ndarray:
    """
    Drops connected components with fewer than `min_size` pixels. Components are connected with corners: 8 neighbours
    in each slice, or 26 across slices. AnoFPDM drops 40 pixels and fewer in 2-D (`min_size=41`), cDDPM 7 voxels and
    fewer in 3-D (`min_size=8`).

    Args:
        mask (`np.ndarray` of shape `(N, H, W)`, boolean or 0/1): Predicted mask.
        min_size (`int`): Smallest component that stays, in pixels; 0 and 1 keep everything.
        dimensions (`int`): 2 for components of each slice, 3 for components of the volume.

    Returns:
        `np.ndarray` of shape `(N, H, W)`, boolean.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 3:
        raise ValueError(f"`mask` must have shape (N, H, W), got {mask.shape}.")
    check_integer("min_size", min_size, 0)
    check_choice("dimensions", dimensions, DIMENSIONS)
    if min_size <= 1:
        return mask
    structure = np.ones((3, 3, 3))
    if dimensions == 2:
        structure[[0, 2]] = 0
    labels, _ = ndimage.label(mask, structure=structure)
    keep = np.bincount(labels.ravel()) >= min_size
    keep[0] = False
    return keep[labels]


def postprocess_maps(
    maps: np.ndarray | torch.Tensor,
    brain: np.ndarray | torch.Tensor,
    *,
    median_size: int = 0,
    median_dimensions: int = 2,
    erosion: int = 0,
    filter_order: str = "erosion_first",
) -> np.ndarray | torch.Tensor:
    """
    Restricts anomaly maps to the brain, optionally without its rim, and filters them by a median.

    Order: erode the brain, set maps outside to 0, median, set maps outside to 0 again. This is the order of the
    programs of cDDPM (without the last step) and SADM (without erosion); ANDi filters without any mask. Masking first
    keeps what lies outside the brain from leaking in through the median, masking last removes what the median carried
    out. With `filter_order="median_first"`, the order of cDDPM's paper, the median sees the rim, too, and only then
    the brain is eroded.

    Args:
        maps (`np.ndarray` or `torch.Tensor` of shape `(N, H, W)`): Anomaly maps of one volume, used as float32.
        brain (`np.ndarray` or `torch.Tensor` of shape `(N, H, W)`, boolean or 0/1): Brain mask, on the same device.
        median_size (`int`, *optional*, defaults to 0): Side of the median window in pixels, 0 for no filter.
        median_dimensions (`int`, *optional*, defaults to 2): 2 or 3, see [`median_filter`].
        erosion (`int`, *optional*, defaults to 0): Pixels to remove from the rim of the brain in each slice.
        filter_order (`str`, *optional*, defaults to `"erosion_first"`):
            `"erosion_first"` or `"median_first"`; without erosion they are the same.

    Returns:
        of the kind of the maps and on their device: `(N, H, W)`, float32, 0 outside the (eroded) brain. Values are not
        scaled.
    """
    filtered = _check_maps(maps)
    brain = brain.bool() if isinstance(brain, torch.Tensor) else _to_tensor(brain, bool)
    if brain.shape != filtered.shape:
        raise ValueError(
            f"`brain` must have the shape of `maps`, got {tuple(brain.shape)} and {tuple(filtered.shape)}."
        )
    check_integer("median_size", median_size, 0)
    eroded = erode_brain(brain, erosion)
    filtered = torch.where(eroded if filter_order == "erosion_first" else brain, filtered, 0)
    if median_size > 1:
        filtered = median.median_filter(filtered, median_size, median_dimensions, inside=eroded)
    filtered = torch.where(eroded, filtered, 0)
    return filtered if isinstance(maps, torch.Tensor) else filtered.numpy()


def _check_maps(maps: np.ndarray | torch.Tensor) -> torch.Tensor:
    maps = maps.float() if isinstance(maps, torch.Tensor) else _to_tensor(maps, np.float32)
    if maps.ndim != 3:
        raise ValueError(f"`maps` must have shape (N, H, W), got {tuple(maps.shape)}.")
    return maps


def _to_tensor(array: np.ndarray, dtype: type) -> torch.Tensor:
    # A copy: torch takes no negative strides, and warns of arrays that are read-only.
    return torch.from_numpy(np.array(array, dtype, order="C"))
