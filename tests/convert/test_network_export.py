"""Networks as files: what they give, for batches of any size, and what is refused."""

import json

import numpy as np
import pytest
import torch

from anodiff.convert.network_export import LEFT_OUT, export_networks, list_networks, make_inputs
from tests.tiny import SETTINGS, SIZE, make_extractor, make_pipeline


onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def run_onnx(path, inputs: dict) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def run_program(path, inputs: dict) -> np.ndarray:
    return torch.export.load(path).module()(*inputs.values()).detach().numpy()


# One of each kind of network: plain, conditioned on labels, on a vector and with its encoder, with a classifier, without
# timesteps, with two images.
@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("AnoDDPMPipeline", ["unet"]),
        ("AnoFPDMPipeline", ["unet"]),
        ("CDDPMPipeline", ["encoder", "unet"]),
        ("ClassifierGuidedPipeline", ["classifier", "unet"]),
        ("DAEPipeline", ["unet"]),
        ("SADMPipeline", ["encoder", "segmenter", "unet"]),
    ],
)
@torch.no_grad()
def test_files_give_what_the_networks_give_for_any_batch(name, networks, tmp_path):
    pipeline = make_pipeline(name)
    record = export_networks(pipeline, tmp_path / "out")
    assert sorted(record["networks"]) == networks
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record
    for component, network in list_networks(pipeline).items():
        described = record["networks"][component]
        for items in (1, 2, 70):
            inputs = make_inputs(network, (SIZE, SIZE), items)
            assert {key: ["B", *value.shape[1:]] for key, value in inputs.items()} == {
                key: value["shape"] for key, value in described["inputs"].items()
            }
            wanted = network(**inputs, return_dict=False)[0]
            given = run_onnx(tmp_path / "out" / described["file"], inputs)
            assert list(given.shape[1:]) == described["output"][1:]
            np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)
