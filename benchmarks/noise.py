"""Milliseconds per simplex field: the `opensimplex` package with numba against `anodiff.schedulers.simplex`.

    pip install "anodiff[benchmark]"
    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/noise.py

All variants make the same fields (6 octaves, persistence 0.8, wavelength 64, new seeds in every round) and are checked
against each other first. Only the plan is kept; its cost is in the column of the first call. They take turns, round by
round, and the median counts, so that other load on the machine meets all of them.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from anodiff.schedulers.simplex import OctaveSimplexNoise


try:
    import numba
    import opensimplex
except ImportError as error:
    raise ImportError(
        'The comparison needs opensimplex and numba: `pip install "opensimplex>=0.4.5" numba`.'
    ) from error


OCTAVES, PERSISTENCE, WAVELENGTH = 6, 0.8, 64.0


def package_vectorize(seeds: list[int], size: int, z: float) -> np.ndarray:
    """As brain_damage calls the package: `np.vectorize` over a grid, anew for every octave."""
    fields = np.zeros((len(seeds), size, size))
    for field, seed in zip(fields, seeds, strict=True):
        generator = opensimplex.OpenSimplex(seed)
        for octave in range(OCTAVES):
            x, y = np.meshgrid(*[np.arange(size) / (WAVELENGTH / 2**octave)] * 2)
            field += PERSISTENCE**octave * np.vectorize(generator.noise3)(x, y, z / (WAVELENGTH / 2**octave))
    return fields


def package_array(seeds: list[int], size: int, z: float) -> np.ndarray:
    """The package's fastest form: one compiled loop over the grid per octave."""
    fields = np.zeros((len(seeds), size, size))
    for field, seed in zip(fields, seeds, strict=True):
        generator = opensimplex.OpenSimplex(seed)
        for octave in range(OCTAVES):
            x = np.arange(size) / (WAVELENGTH / 2**octave)
            field += PERSISTENCE**octave * generator.noise3array(x, x, np.array([z / (WAVELENGTH / 2**octave)]))[0]
    return fields


def variants(size: int, batch: int) -> dict:
    """Name -> function from a list of seeds to fields. All use z = 20 pixels but the one that says otherwise."""
    fixed = OctaveSimplexNoise(OCTAVES, PERSISTENCE, WAVELENGTH, z=20.0)
    direct = OctaveSimplexNoise(OCTAVES, PERSISTENCE, WAVELENGTH, z="timestep")
    shared, distinct = torch.full((batch,), 20), torch.arange(batch) * 50 + 20
    return {
        "opensimplex, np.vectorize(noise3)": lambda seeds: package_vectorize(seeds, size, 20.0),
        "opensimplex, noise3array": lambda seeds: package_array(seeds, size, 20.0),
        "anodiff, plan, float32": lambda seeds: fixed(torch.tensor(seeds), None, size, size),
        "anodiff, plan, float64": lambda seeds: fixed(torch.tensor(seeds), None, size, size, torch.float64),
        "anodiff, direct, one t for all": lambda seeds: direct(torch.tensor(seeds), shared, size, size),
        "anodiff, direct, t per image": lambda seeds: direct(torch.tensor(seeds), distinct, size, size),
    }


def main(batch: int, sizes: list[int], rounds: int):
    print(f"CPU, torch {torch.__version__} with {torch.get_num_threads()} thread(s), float32 output unless named;")
    print(
        f"opensimplex {opensimplex.__version__}, numba {numba.__version__} with {numba.get_num_threads()} thread(s);"
    )
    print(f"batch {batch}, {OCTAVES} octaves, median of {rounds} interleaved rounds. Speed-up: other / this.\n")
    print("| size | variant | first call, ms | ms per image | against np.vectorize | against noise3array |")
    print("|---|---|---|---|---|---|")
    for size in sizes:
        functions = variants(size, batch)
        seeds = list(range(1, batch + 1))
        first, results = {}, {}
        for name, function in functions.items():
            start = time.perf_counter()
            results[name] = np.asarray(function(seeds))
            first[name] = 1e3 * (time.perf_counter() - start)
        expected, *others = results.values()
        for name, fields in zip(list(results)[1:], others, strict=True):
            # The variant with a timestep per image agrees for the first image, whose timestep is 20.
            np.testing.assert_allclose(fields[0], expected[0], rtol=0, atol=1e-5, err_msg=name)

        times = {name: [] for name in functions}
        for turn in range(rounds):
            seeds = list(range(1000 * turn + 1, 1000 * turn + batch + 1))
            for name, function in functions.items():
                start = time.perf_counter()
                function(seeds)
                times[name].append(1e3 * (time.perf_counter() - start) / batch)
        medians = {name: statistics.median(values) for name, values in times.items()}
        loop, array = list(medians.values())[:2]
        for name, value in medians.items():
            row = f"{first[name]:.0f} | {value:.2f} | {loop / value:.1f} | {array / value:.1f}"
            print(f"| {size} x {size} | {name} | {row} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="fields per call")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="side lengths in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is reported")
    main(**vars(parser.parse_args()))
