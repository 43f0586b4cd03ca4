"""What a method has to beat: the plain and the inverted intensity of a modality as a map, and trivial statistics as
slice scores.

Where one of them wins, the table shows it.
"""

import numpy as np
from scipy import ndimage


def intensity_map(
    image: np.ndarray, brain: np.ndarray, channel: int, value_range: tuple[float, float], over_median: bool = False
) -> np.ndarray:
    """Returns the intensity of one modality `channel` of a subject's slices `(N, C, H, W)` as an anomaly map: bright
    is anomalous. The two ends of `value_range` become 0 and 1; values below are 0. `(N, H, W)`, float32.

    `over_median` divides by the median of the subject's brain. A bright lesion moves the percentile that the processor
    divides by, but hardly the median: the stronger baseline."""
    low, high = value_range
    maps = np.clip((image[:, channel] - low) / (high - low), 0.0, None).astype(np.float32)
    if over_median and brain.any():
        maps /= max(float(np.median(maps[brain])), 1e-6)
    return maps


def inverted_map(image: np.ndarray, brain: np.ndarray, channel: int, value_range: tuple[float, float]) -> np.ndarray:
    """Returns the inverted intensity of one modality as an anomaly map, arguments as in [`intensity_map`]: dark is
    anomalous, as lesions are in T1. The two ends of `value_range` become 1 and 0; values above are 0, and so is all that
    lies outside the brain, which would be darker than any lesion."""
    low, high = value_range
    maps = np.clip((high - image[:, channel]) / (high - low), 0.0, None).astype(np.float32)
    return np.where(brain, maps, np.float32(0))


def equalised_map(image: np.ndarray, brain: np.ndarray, channel: int, value_range: tuple[float, float]) -> np.ndarray:
    """Returns the histogram-equalised intensity of one modality as an anomaly map, arguments as in [`intensity_map`]:
    ANDi's thresholding baseline, there of the FLAIR image.

    The authors equalise the volume before they bring it to the network's size, with [`equalise`]; here it is the
    prepared slices, so that the values differ a little where resizing mixes them."""
    low, high = value_range
    return np.where(brain, equalise(np.clip((image[:, channel] - low) / (high - low), 0.0, None)), np.float32(0))


def equalise(values: np.ndarray) -> np.ndarray:
    """Equalises the histogram of the voxels > 0 of a volume of any shape, as scikit-image's `equalize_hist` with a
    mask: the share of these voxels below a value, interpolated between the centres of 256 equal bins from the smallest
    to the largest of them. Values are used as float32; those not above 0 become 0."""
    values = np.asarray(values, np.float32)
    positive = values > 0
    if not positive.any():
        return np.zeros_like(values)
    values = values / values.max()
    counts, edges = np.histogram(values[positive], 256)
    shares = counts.cumsum() / counts.sum()
    equalised = np.interp(values, (edges[:-1] + edges[1:]) / 2, shares)
    return np.where(positive, equalised, 0).astype(np.float32)


def slice_statistics(image: np.ndarray, brain: np.ndarray) -> dict[str, np.ndarray]:
    """Returns statistics of every slice `(N, C, H, W)` that know nothing of anatomy, `(N,)` each: brain area in
    pixels, mean intensity and mean absolute Laplacian (sharpness) in the brain, over all modalities."""
    area = brain.sum((1, 2))
    inside = brain[:, None] / np.maximum(area, 1)[:, None, None, None] / image.shape[1]
    sharpness = np.abs(np.stack([[ndimage.laplace(channel) for channel in channels] for channels in image]))
    return {
        "brain area": area.astype(np.float64),
        "mean intensity": (image * inside).sum((1, 2, 3)),
        "mean absolute Laplacian": (sharpness * inside).sum((1, 2, 3)),
    }
