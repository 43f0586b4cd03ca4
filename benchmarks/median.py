"""Seconds of the median filter of one volume's maps, beside `scipy.ndimage.median_filter` on one core.

    python benchmarks/median.py [--device cuda]

The brain is an ellipsoid that takes a third of the volume. All ways are checked against each other to the bit. They
take turns, round by round, and the median of the ratios counts. On a CPU the processor's time is measured, so that
other load on the machine matters less.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from scipy import ndimage

from anodiff.pipelines.median import median_filter


WINDOWS = ((3, 2), (5, 2), (3, 3), (5, 3))


def timed(function, device: str) -> tuple[float, np.ndarray]:
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    return seconds, np.asarray(result.cpu() if isinstance(result, torch.Tensor) else result)


def main(shape: tuple[int, int, int], rounds: int, device: str) -> None:
    grid = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    brain = sum((axis / 0.86) ** 2 for axis in grid) < 1
    maps = np.where(brain, np.random.default_rng(0).gamma(2.0, size=shape), 0).astype(np.float32)
    on_device, inside = torch.from_numpy(maps).to(device), torch.from_numpy(brain).to(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU with {torch.get_num_threads()} thread(s)"
    print(f"{name}, torch {torch.__version__}, {' x '.join(map(str, shape))}, brain {brain.mean():.0%} of it\n")
    print("| window | scipy, s | everywhere, s | of scipy's speed | in the brain, s | of scipy's speed |")
    print("|---|---|---|---|---|---|")
    for size, dimensions in WINDOWS:
        window = (size if dimensions == 3 else 1, size, size)
        ways = (
            lambda window=window: ndimage.median_filter(maps, size=window),
            lambda size=size, dimensions=dimensions: median_filter(on_device, size, dimensions),
            lambda size=size, dimensions=dimensions: median_filter(on_device, size, dimensions, inside=inside),
        )
        times = [[], [], []]
        for way in ways[1:]:
            timed(way, device)
        for _ in range(rounds):
            results = []
            for values, way in zip(times, ways, strict=True):
                seconds, result = timed(way, device)
                values.append(seconds)
                results.append(result)
        np.testing.assert_array_equal(results[1], results[0])
        np.testing.assert_array_equal(results[2], np.where(brain, results[0], 0))
        scipy, *others = times
        cells = [f"{statistics.median(scipy):.3f}"]
        for values in others:
            ratio = statistics.median(base / value for base, value in zip(scipy, values, strict=True))
            cells += [f"{statistics.median(values):.4f}", f"x {ratio:.1f}"]
        print(f"| {' x '.join(map(str, window[3 - dimensions :]))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[155, 128, 128], help="slices, rows and columns")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the median is reported")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    main(tuple(options.shape), options.rounds, options.device)
