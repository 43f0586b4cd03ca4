"""Everything that is promised of a GPU, in about five minutes: one command, one line of JSON for each row.

    python benchmarks/gpu.py                 # all parts on the GPU; then a Markdown table
    python benchmarks/gpu.py --parts network_of_andi volume
    python benchmarks/gpu.py --quick         # tiny sizes, on a CPU too: shows that every part runs

Each part is a process of its own with a time limit, so that one that fails or hangs leaves the others' rows. The first
ones prepare themselves side by side, which is mostly compiling; when all are ready they measure one after the other,
the device to themselves. A training step and the start of a command, which the processor's load would disturb, come
after them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# Seconds that a part may take to prepare itself, and as many again to measure.
LIMIT = 200
# Evaluations of a network that are timed together.
EVALUATIONS = 4
# Processes of a compilation.
COMPILERS = 4
# What a part prints when it is ready; then it waits for a line.
READY = "ready"
Row = dict[str, object]


def network_of_andi(quick: bool, device: str) -> Iterator[Row]:
    yield network("ANDi", "andi_brats21.yaml", 4, 256, 150, quick, device)


def network_on_patches(quick: bool, device: str) -> Iterator[Row]:
    from networks import PATCHES

    yield network("ANDi on patches", "andi_brats21.yaml", 4, 256, 150, quick, device, **PATCHES)


def network_of_anofpdm(quick: bool, device: str) -> Iterator[Row]:
    yield network("AnoFPDM", "anofpdm_brats21.yaml", 1, 64, 350, quick, device)


def network_of_cimd(quick: bool, device: str) -> Iterator[Row]:
    yield network("CIMD", "cimd_lidc.yaml", 2, 64, 350, quick, device)


def network(
    name: str, config: str, channels: int, items: int, goal: int, quick: bool, device: str, **changes: object
) -> Row:
    """TFLOP/s of a network of a paper's size, but for `changes`, as `enable_fast_inference()` makes it."""
    import torch
    from networks import make_network

    if quick:
        items, changes["block_out_channels"] = 2, [64] * 4
        changes |= {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}
    size = 32 if quick else 128
    unet, gflop = make_network(config, size, channels, **changes)
    if device == "cuda":
        unet = unet.to(device, torch.bfloat16, memory_format=torch.channels_last)
        unet = torch.compile(unet, fullgraph=True, dynamic=False)
    sample = torch.randn(items, channels, size, size, device=device, dtype=next(unet.parameters()).dtype)
    sample = sample.to(memory_format=torch.channels_last)
    timesteps = torch.full((items,), 100, device=device)
    with torch.no_grad():
        unet(sample, timesteps)
        wait_for_turn()
        # Several before the device is waited for, as a pipeline does: the next one is started while it works.
        seconds = best(lambda: [unet(sample, timesteps) for _ in range(EVALUATIONS)], device) / EVALUATIONS
    rate = round(items * gflop / 1e3 / seconds, 1)
    return {"what": f"{name}, {gflop:.0f} GFLOP, {items} items, TFLOP/s", "goal": f">= {goal}", "measured": rate}


def volume(quick: bool, device: str) -> Iterator[Row]:
    yield from time_volume("ANDi", quick, device)


def volume_on_patches(quick: bool, device: str) -> Iterator[Row]:
    from networks import PATCHES

    yield from time_volume("ANDi on patches", quick, device, **PATCHES)


def time_volume(name: str, quick: bool, device: str, **changes: object) -> Iterator[Row]:
    """ANDi with its authors' settings, slices to filtered map; a network with `changes`."""
    import andi

    from anodiff import ANDiPipeline
    from anodiff.pipelines.median import median_filter

    size, count, timesteps = (32, 4, 4) if quick else (128, 155, 125)
    bare, _ = andi.make_pipeline(4, size, device, **changes)
    pipe = quiet(ANDiPipeline(**bare.components, median_size=5, median_dimensions=3))
    slices = make_brains(count, 4, size, device)

    def call(pipe):
        pipe(slices, start=75, stop=75 + timesteps)

    fast = quiet(ANDiPipeline(**copy.deepcopy(bare.components), median_size=5, median_dimensions=3))
    fast.enable_fast_inference(**({"compile": False} if quick else {}))
    call(fast)
    wait_for_turn()
    # Sizes of batches are chosen again, now that nothing disturbs that.
    fast.batches.limits.clear()
    seconds = {}
    for kind, timed_pipe, goal in (("default call", pipe, {}), ("fast", fast, {"goal": "<= 1.5"})):
        seconds[kind] = best(lambda pipe=timed_pipe: call(pipe), device, 2)
        items = [limit.items for limit in timed_pipe.batches.limits.values()]
        what = f"{name}, {count} slices, {timesteps} timesteps, {kind}, s"
        yield {"what": what, **goal, "measured": round(seconds[kind], 3), "note": f"batches of {items}"}
    maps, brain = slices[:, 0], slices[:, 0] > -1
    share = best(lambda: median_filter(maps, 5, 3, inside=brain), device) / seconds["fast"]
    yield {"what": f"{name}, of it the 5 x 5 x 5 median", "goal": "<= 0.05", "measured": round(share, 4)}


def andi_calls(quick: bool, device: str) -> Iterator[Row]:
    import andi

    size, steps = sizes(quick)
    pipe, _ = andi.make_pipeline(1, size, device)
    yield overhead("ANDi", pipe, {"start": 75, "stop": 75 + steps}, quick, device)


def anoddpm_calls(quick: bool, device: str) -> Iterator[Row]:
    import overhead as anoddpm

    size, steps = sizes(quick)
    pipe, _ = anoddpm.make_pipeline(size, device)
    yield overhead("AnoDDPM, chain", pipe, {"noise_level": steps, "mode": "partial"}, quick, device)


def anofpdm_calls(quick: bool, device: str) -> Iterator[Row]:
    import anofpdm

    size, steps = sizes(quick)
    pipe, _ = anofpdm.make_pipeline(size, device)
    yield overhead("AnoFPDM", pipe, {"forward_steps": steps}, quick, device)


def sizes(quick: bool) -> tuple[int, int]:
    """Size of a slice and evaluations of it."""
    return (32, 2) if quick else (128, 50)


def overhead(name: str, bare_pipe, settings: dict, quick: bool, device: str) -> Row:
    """Time of a call over time of its evaluations alone, filter included, of the fast network."""
    import torch

    size, _ = sizes(quick)
    slices = make_brains(4 if quick else 128, 1, size, device)
    pipe = quiet(type(bare_pipe)(**bare_pipe.components, median_size=5))
    pipe.enable_fast_inference(**({"compile": False} if quick else {}))
    calls: list[tuple] = []
    evaluate = pipe.batches.evaluate

    def record(network, call, *inputs, **options):
        calls.append((network, call, inputs, options))
        return evaluate(network, call, *inputs, **options)

    pipe.batches.evaluate = record

    def whole():
        pipe(slices, **settings)

    whole()
    pipe.batches.evaluate = evaluate

    @torch.no_grad()
    def bare():
        for network, call, inputs, options in calls:
            evaluate(network, call, *inputs, **options)

    bare()
    wait_for_turn()
    pairs = [(best(whole, device, 1), best(bare, device, 1)) for _ in range(2)]
    ratio = min(first for first, _ in pairs) / min(second for _, second in pairs)
    return {
        "what": f"call over its {len(calls)} evaluations, {name}",
        "goal": "<= 1.05",
        "measured": round(ratio, 3),
    }


def draws(quick: bool, device: str) -> Iterator[Row]:
    """Noise of a whole batch, and drawn heads."""
    import torch

    from anodiff.data.phantoms.drawn_heads import DrawnHeads
    from anodiff.data.phantoms.sets import locate_label_maps
    from anodiff.schedulers.draws import make_keys, normal
    from anodiff.volumes.processor import VolumeProcessor

    items, heads = (4, 2) if quick else (256, 512)
    keys = make_keys(0, list(range(items)), 0, torch.device(device))
    shape = (4, 32, 32) if quick else (4, 128, 128)
    normal(keys, shape)
    wait_for_turn()
    seconds = best(lambda: normal(keys, shape), device)
    yield {
        "what": f"normal draws, {items} items of {' x '.join(map(str, shape))}, ms",
        "measured": round(1e3 * seconds, 2),
    }
    processor = VolumeProcessor(
        modalities=["flair"], crop="brain", size=(96, 80), intensity="brain_median", brain_mask="given", strip=True
    )
    drawn = DrawnHeads(locate_label_maps("builtin"), processor, "train", device=device)
    seconds = best(lambda: drawn.draw(range(heads)), device, 1)
    yield {"what": f"{heads} slices of drawn heads, s", "measured": round(seconds, 3)}


def training(quick: bool, device: str) -> Iterator[Row]:
    """A step of `train.py` over a step of a bare loop on tensors in the device's memory."""
    size = ["--train.batch_size", "4"] if quick else ["--train.batch_size", "128", "--train.mixed_precision", "bf16"]
    steps = "6" if quick else "150"
    command = [sys.executable, str(ROOT / "benchmarks/training.py"), "--train.max_steps", steps, *size]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    ratio = float(lines[-1].strip("| ").split("|")[-1])
    yield {"what": "training step over a bare loop", "goal": "<= 1.05", "measured": ratio, "note": lines[-1]}


def start(quick: bool, device: str) -> Iterator[Row]:
    """Start of a command: import of torch and diffusers, and what `predict.py` imports."""
    times = {}
    for name in ("torch, diffusers", "anodiff.predict, anodiff.pipelines.pipeline_andi"):
        rounds = 1 if quick else 2
        command = [sys.executable, "-c", f"import {name}"]
        times[name] = min(timed(lambda command=command: subprocess.run(command, check=True)) for _ in range(rounds))
    first, second = times.values()
    note = f"{second:.2f} s beside {first:.2f} s"
    yield {
        "what": "start over `import torch, diffusers`",
        "goal": "<= 1.5",
        "measured": round(second / first, 2),
        "note": note,
    }


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_brains(count: int, channels: int, size: int, device: str):
    """Slices `(N, C, H, W)` in [-1, 1] with a third of the pixels above the background, as a brain has."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, size, size, generator=generator)
    axis = torch.linspace(-1, 1, size)
    inside = axis[:, None].square() + axis.square() < 4 / (3 * torch.pi)
    return torch.where(inside, images, -1.0).to(device)


def timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def best(function: Callable[[], object], device: str, rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds, after one that warms up."""
    import torch

    def synchronized() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    synchronized()
    return min(timed(synchronized) for _ in range(rounds))


def wait_for_turn() -> None:
    """Tells that this part is ready, and waits until it has the device to itself."""
    print(READY, flush=True)
    sys.stdin.readline()


TOGETHER = (
    network_of_andi,
    network_on_patches,
    network_of_anofpdm,
    network_of_cimd,
    volume,
    volume_on_patches,
    andi_calls,
    anoddpm_calls,
    anofpdm_calls,
    draws,
)
ALONE = (training, start)
PARTS = {part.__name__: part for part in (*TOGETHER, *ALONE)}


def run_part(name: str, options: argparse.Namespace, all_ready: threading.Barrier, turn: threading.Lock) -> list[Row]:
    """Runs a part in a process of its own, which measures in its turn once all are ready or have ended; a failure is a
    row, too."""
    command = [sys.executable, sys.argv[0], "--part", name, "--device", options.device, *["--quick"] * options.quick]
    settings = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(COMPILERS)}
    stopped = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=settings
        ) as process,
    ):

        def stop() -> None:
            stopped.set()
            process.kill()

        def read(until: str | None = None) -> list[Row]:
            """Rows up to a line, or to the end; the process is stopped after the limit."""
            rows, limit = [], threading.Timer(options.limit, stop)
            limit.start()
            for line in process.stdout:
                rows += [json.loads(line)] if line.startswith("{") else []
                if line.strip() == until:
                    break
            else:
                process.wait()
            limit.cancel()
            return rows

        rows = read(READY)
        all_ready.wait()
        with turn:
            if process.poll() is None:
                process.stdin.write("\n")
                process.stdin.flush()
                rows += read()
        errors.seek(0)
        failure = errors.read().strip().splitlines()[-1:] if process.returncode else []
    if stopped.is_set():
        failure = [f"stopped after {options.limit:g} s"]
    return rows + [{"part": name, "what": name, "failed": reason} for reason in failure]


def show(rows: list[Row]) -> list[Row]:
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a part")
    options = parser.parse_args()
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.part:
        for row in PARTS[options.part](options.quick, options.device):
            print(json.dumps({"part": options.part, **row}), flush=True)
        return 0
    rows, together = [], [name for name in options.parts if PARTS[name] in TOGETHER]
    all_ready, turn = threading.Barrier(max(len(together), 1)), threading.Lock()
    with ThreadPoolExecutor(len(TOGETHER)) as pool:
        running = [pool.submit(run_part, name, options, all_ready, turn) for name in together]
        rows += [row for part in as_completed(running) for row in show(part.result())]
    for name in options.parts:
        if name not in together:
            rows += show(run_part(name, options, threading.Barrier(1), turn))
    print("\n| what | goal | measured |\n|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row.get('goal', '')} | {row.get('measured', row.get('failed'))} |")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
