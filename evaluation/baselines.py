"""What a method has to beat: the plain intensity of a modality as a map, and trivial statistics as slice scores.

Where one of them wins, the table shows it.
"""

import numpy as np
from scipy import ndimage


def intensity_map(
    image: np.ndarray,
    brain: np.ndarray,
    channel: int,
    value_range: tuple[float, float],
    over_median: bool = False,
) -> np.ndarray:
    """
    The intensity of one modality as an anomaly map: bright is anomalous.

    Args:
        image (`np.ndarray` of shape `(N, C, H, W)`): Slices of one subject in the processor's value range.
        brain (`np.ndarray` of shape `(N, H, W)`, boolean): Brain masks.
        channel (`int`): Modality.
        value_range (`tuple[float, float]`): What the map's 0 and 1 are.
        over_median (`bool`, *optional*, defaults to `False`):
            Divide by the median of the subject's brain. A bright lesion moves the percentile that the processor divides by, but
            hardly the median: the stronger baseline.

    Returns:
        `np.ndarray` of shape `(N, H, W)`, float32, >= 0.
    """
    low, high = value_range
    maps = np.clip((image[:, channel] - low) / (high - low), 0.0, None).astype(np.float32)
    if over_median and brain.any():
        maps /= max(float(np.median(maps[brain])), 1e-6)
    return maps


def slice_statistics(image: np.ndarray, brain: np.ndarray) -> dict[str, np.ndarray]:
    """
    Statistics of every slice that know nothing of anatomy, `(N,)` each: brain area in pixels, mean intensity and mean absolute
    Laplacian (sharpness) in the brain, over all modalities.

    Args:
        image (`np.ndarray` of shape `(N, C, H, W)`): Slices.
        brain (`np.ndarray` of shape `(N, H, W)`, boolean): Brain masks.
    """
    area = brain.sum((1, 2))
    inside = brain[:, None] / np.maximum(area, 1)[:, None, None, None] / image.shape[1]
    sharpness = np.abs(np.stack([[ndimage.laplace(channel) for channel in channels] for channels in image]))
    return {
        "brain area": area.astype(np.float64),
        "mean intensity": (image * inside).sum((1, 2, 3)),
        "mean absolute Laplacian": (sharpness * inside).sum((1, 2, 3)),
    }
