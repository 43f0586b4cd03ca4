"""Milliseconds of keyed normal draws, `anodiff.schedulers.draws`, beside torch's own generators.

    OMP_NUM_THREADS=1 python benchmarks/draws.py

Ways take turns, round by round, and the median counts; the last column is the median of the ratios within a round.
"""

import argparse
import statistics
import time

import torch

from anodiff.schedulers.draws import make_keys, normal


def timed(function, device: str) -> float:
    function_of_device = torch.cuda.synchronize if device == "cuda" else lambda: None
    function_of_device()
    start = time.perf_counter()
    function()
    function_of_device()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images of a batch, a key each")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="side lengths in pixels")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds; the median is reported")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, batch = options.device, options.batch
    print(f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, batch {batch}\n")
    print("| size | way | ms | of one torch.randn |\n|---|---|---|---|")
    for size in options.sizes:
        shape = options.channels, size, size
        one = torch.Generator(device).manual_seed(0)

        def torch_generators(shape=shape):
            generators = [torch.Generator(device).manual_seed(number) for number in range(batch)]
            return torch.stack([torch.randn(shape, generator=generator, device=device) for generator in generators])

        ways = {
            "torch.randn, one generator": lambda shape=shape, one=one: torch.randn(
                batch, *shape, generator=one, device=device
            ),
            "torch.randn, a generator per image": torch_generators,
            "keys and draws": lambda shape=shape: normal(make_keys(0, range(batch), device=device), shape),
        }
        times = {name: [] for name in ways}
        for turn in range(options.rounds + 2):
            for name, way in ways.items():
                milliseconds = timed(way, device)
                if turn >= 2:
                    times[name].append(milliseconds)
        first = next(iter(times.values()))
        for name, values in times.items():
            ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
            print(f"| {size} | {name} | {statistics.median(values):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
