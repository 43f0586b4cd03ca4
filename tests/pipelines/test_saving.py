"""A folder that a pipeline is saved into again, in whatever form."""

import pytest
import torch

from anodiff import AnomalyPipeline
from anodiff.files import read_json

from ..tiny import make_pipeline


SHARDS, BIN = {"max_shard_size": "20KB"}, {"safe_serialization": False}


def save_larger(pipe, folder, **how) -> list[torch.Tensor]:
    """Saves a pipeline with larger weights, and returns them."""
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.5)
    pipe.save_pretrained(folder, **how)
    return [parameter.detach().clone() for parameter in pipe.unet.parameters()]


def assert_loaded(folder, weights, **how):
    loaded = AnomalyPipeline.from_pretrained(folder, **how).unet.parameters()
    assert all(torch.equal(*pair) for pair in zip(loaded, weights, strict=True))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(("first", "second"), [({}, BIN), (BIN, {}), (SHARDS, {}), ({}, SHARDS), (SHARDS, BIN)])
def test_what_was_saved_last_is_loaded(tmp_path, first, second, variant):
    pipe, how = make_pipeline("AnoDDPMPipeline"), {} if variant is None else {"variant": variant}
    save_larger(pipe, tmp_path, **first, **how)
    weights = save_larger(pipe, tmp_path, **second, **how)
    loading = how | ({"use_safetensors": False} if second == BIN else {})
    assert_loaded(tmp_path, weights, **loading)
    assert_loaded(tmp_path, weights, **how)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("unet/*")}
    listed = {name for name in read_json(tmp_path / "model_index.json")["_sha256"] if name.startswith("unet/")}
    assert there == listed and len(there) == (2 if second != SHARDS else len(there))


@pytest.mark.parametrize("form", [{}, SHARDS, BIN])
def test_another_variant_stays(tmp_path, form):
    pipe = make_pipeline("AnoDDPMPipeline")
    plain = save_larger(pipe, tmp_path, **form)
    half = save_larger(pipe, tmp_path, variant="fp16")
    assert_loaded(tmp_path, plain)
    assert_loaded(tmp_path, half, variant="fp16")
