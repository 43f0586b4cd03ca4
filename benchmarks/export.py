"""Size, speed and deviation of an exported network beside PyTorch, float32, float16 and int8.

    python benchmarks/export.py                        # the network of anoddpm-flair, one thread
    python benchmarks/export.py --model outputs/train/pipeline --batch 4

Needs the extra `onnx`. Times are those of the processor, the least of five rounds in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from anodiff import AnomalyPipeline
from anodiff.convert.network_export import export_networks, make_inputs


class Slices(CalibrationDataReader):
    """Noised slices that the ranges of activations are taken from."""

    def __init__(self, inputs: dict[str, np.ndarray]):
        self.parts = iter([inputs])

    def get_next(self):
        return next(self.parts, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="anoddpm-flair")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = AnomalyPipeline.from_pretrained(options.model)
    network = pipeline.unet.eval()
    tensors = make_inputs(
        network, pipeline.processor.config.size, options.batch, pipeline.scheduler.config.num_train_timesteps
    )
    inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = 1

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {name: Path(folder, name.replace(" ", "_"), "unet.onnx") for name in ("ONNX float32", "ONNX float16")}
        for name, path in files.items():
            export_networks(pipeline, path.parent, precision=name.split()[1])
        plain = files["ONNX float32"]
        files |= {f"ONNX int8, {kind}": plain.with_name(f"{kind}.onnx") for kind in ("dynamic", "static")}
        quantize_dynamic(plain, files["ONNX int8, dynamic"], weight_type=QuantType.QInt8)
        prepared = plain.with_name("prepared.onnx")
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, files["ONNX int8, static"], Slices(inputs), per_channel=True, op_types_to_quantize=["Conv"]
        )
        sessions = {name: onnxruntime.InferenceSession(path, session_options) for name, path in files.items()}
        calls = {"PyTorch float32": lambda: network(**tensors).sample.numpy()}
        calls |= {name: (lambda session=session: session.run(None, inputs)[0]) for name, session in sessions.items()}
        wanted = calls["PyTorch float32"]()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                begun = time.process_time()
                call()
                seconds[name].append(time.process_time() - begun)
        bare = min(seconds["PyTorch float32"])
        print("| network | MB | time of PyTorch's | largest deviation, of the standard deviation |")
        print("|---|---|---|---|")
        for name, call in calls.items():
            megabytes = f"{files[name].stat().st_size / 1e6:.1f}" if name in files else ""
            deviation = np.abs(call() - wanted).max() / wanted.std()
            print(f"| {name} | {megabytes} | {min(seconds[name]) / bare:.2f} | {deviation:.1e} |")


if __name__ == "__main__":
    main()
