"""`convert.py andi` in a process of its own: weights under the original's names become a pipeline that computes with them."""

import math
import os
from pathlib import Path

import numpy as np
import torch

from anodiff import ANDiUNet2DModel, AnomalyPipeline


GOLDEN = Path(os.environ.get("ANODIFF_GOLDEN", Path(__file__).parents[1] / "golden")) / "andi"


def original_state_dict():
    """Random weights under the names and shapes of the original program, as a run on several devices saves them."""
    generator = torch.Generator().manual_seed(0)
    with np.load(GOLDEN / "andi_unet.npz", allow_pickle=False) as golden:
        names, shapes = golden["param_names"], golden["param_shapes"]
    state = {}
    for name, text in zip(map(str, names), map(str, shapes), strict=True):
        shape = tuple(map(int, text.split("x")))
        values = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else 100)
        state[f"module.{name}"] = values + (1 if len(shape) == 1 and name.endswith("weight") else 0)
    return state


def test_convert_andi(workplace):
    state = original_state_dict()
    torch.save({"ema": state, "epoch": 232}, workplace.folder / "andi.pt")
    done = workplace.run("convert", "andi", "andi.pt", "andi_pipeline", "--key", "ema")
    assert "Pipeline folder written" in done.stdout and "Expected types" not in done.stderr
    pipe = AnomalyPipeline.from_pretrained(workplace.folder / "andi_pipeline")
    assert type(pipe).__name__ == "ANDiPipeline" and type(pipe.unet).__name__ == "ANDiUNet2DModel"
    assert tuple(pipe.processor.config.modalities) == ("flair", "t1", "t1ce", "t2") and not pipe.processor.config.clip
    assert (pipe.config.start, pipe.config.stop) == (75, 200)
    own = pipe.unet.state_dict()
    assert len(own) == len(state)
    # A few by hand, from the first, the middle and the last layers.
    for name, original in (
        ("conv_in.conv.weight", "inc.double_conv.0.weight"),
        ("down_blocks.1.attention.to_qkv.bias", "sa1.mha.in_proj_bias"),
        ("mid_attention.norm.weight", "sa4.ln.weight"),
        ("up_blocks.0.residual.norm.bias", "up1.conv.0.double_conv.1.bias"),
        ("conv_out.bias", "outc.bias"),
    ):
        given = state[f"module.{original}"]
        torch.testing.assert_close(own[name], given.mT if given.ndim == 4 else given, rtol=0, atol=0)
    pipe.set_progress_bar_config(disable=True)
    slices = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = pipe(slices, num_timesteps=2, threshold=None).anomaly_map
    assert torch.isfinite(torch.as_tensor(maps)).all() and maps.max() > 0

    # The original saw transposed slices.
    original = ANDiUNet2DModel(sample_size=32).eval()
    names = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    original.load_state_dict(original.convert_original_state_dict(names))
    with torch.no_grad():
        expected = original(slices.mT, torch.tensor([7])).sample.mT
        torch.testing.assert_close(pipe.unet(slices, torch.tensor([7])).sample, expected, atol=1e-4, rtol=1e-4)
        assert (original(slices, torch.tensor([7])).sample - expected).abs().max() > 0.01

    del state["module.outc.bias"]
    torch.save(state, workplace.folder / "incomplete.pt")
    wrong = workplace.run("convert", "andi", "incomplete.pt", "andi_wrong", check=False)
    assert wrong.returncode == 1 and "does not fit the network of andi" in wrong.stderr
    assert not (workplace.folder / "andi_wrong").exists()
