"""The package `convert`: weights under the original's names become a pipeline that computes with them."""

import math
import os
import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from anodiff import ANDiUNet2DModel, AnomalyPipeline, NoisyClassifierModel
from anodiff.convert import main as convert
from anodiff.convert.parts import read_weights, transpose_kernels


GOLDEN = Path(os.environ.get("ANODIFF_GOLDEN", Path(__file__).parents[1] / "golden"))


def test_script_module_and_command_are_the_same_program(tmp_path):
    # The script `convert.py` stands beside the package of its name.
    script = Path(__file__).parents[2] / "convert.py"
    answers = []
    for command in ([script], ["-m", "anodiff.convert"], ["-m", "anodiff", "convert"]):
        asked = [sys.executable, *map(str, command), "andi", "missing.pt", "out"]
        done = subprocess.run(asked, cwd=tmp_path, text=True, capture_output=True)
        answers.append((done.returncode, done.stdout, done.stderr))
    assert answers == [(1, "", "error: There is no file missing.pt.\n")] * 3


def original_state_dict(recording: str = "andi/andi_unet", replaced: dict | None = None):
    """Random weights under the names and shapes of the original program, some `replaced`, as a run on several devices saves them."""
    generator = torch.Generator().manual_seed(0)
    with np.load(GOLDEN / f"{recording}.npz", allow_pickle=False) as golden:
        names, shapes = golden["param_names"], golden["param_shapes"]
    state = {}
    for name, text in zip(map(str, names), map(str, shapes), strict=True):
        shape = (replaced or {}).get(name, tuple(map(int, text.replace("x", ",").split(","))))
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


def first_convolution(channels: int) -> dict:
    return {"input_blocks.0.0.weight": (32, channels, 3, 3)}


def last_convolution(channels: int) -> dict:
    return {"out.2.weight": (channels, 32, 3, 3), "out.2.bias": (channels,)}


# The recorded networks are small: two levels with one block each, attention in the second.
SMALL = ("--unet.block_out_channels", "[32, 64]", "--unet.layers_per_block", "1")
BLOCKS = (
    "--unet.down_block_types",
    "[DownBlock2D, AttnDownBlock2D]",
    "--unet.up_block_types",
    "[AttnUpBlock2D, UpBlock2D]",
)


def test_convert_anofpdm_v2(workplace):
    state = original_state_dict("anofpdm/unet_v2", first_convolution(4) | last_convolution(4))
    torch.save(state, workplace.folder / "v2.pt")
    workplace.run("convert", "anofpdm", "v2", "v2.pt", "v2", *SMALL, "--unet.attention_levels", "[1]")
    pipe = AnomalyPipeline.from_pretrained(workplace.folder / "v2")
    assert type(pipe).__name__ == "AnoFPDMPipeline" and type(pipe.unet).__name__ == "AnoFPDMUNet2DModel"
    assert tuple(pipe.processor.config.modalities) == ("flair", "t1", "t1ce", "t2")
    assert pipe.config.guidance_scale == 2 and tuple(pipe.config.modalities) == ("flair", "t2")
    assert pipe.config.similarity_threshold is None and pipe.unet.config.dropout == 0.1
    own = pipe.unet.state_dict()
    assert len(own) == len(state)
    for name, original in (
        ("down_blocks.0.weight", "input_blocks.0.0.weight"),
        ("down_blocks.2.bias", "input_blocks.2.0.op.bias"),
        ("mid_attention.to_class_kv.bias", "middle_block.1.encoder_kv.bias"),
        ("up_blocks.1.upsample.weight", "output_blocks.1.2.conv.weight"),
        ("class_embedding.weight", "label_emb.weight"),
    ):
        given = state[f"module.{original}"]
        torch.testing.assert_close(own[name], given.mT if given.ndim == 4 else given, rtol=0, atol=0)
    pipe.set_progress_bar_config(disable=True)
    slices = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = torch.as_tensor(pipe(slices, forward_steps=2).anomaly_map)
    assert torch.isfinite(maps).all() and maps.max() > 0

    torch.save(original_state_dict("anofpdm/unet_v2"), workplace.folder / "two.pt")
    wrong, two = str(workplace.folder / "wrong"), str(workplace.folder / "two.pt")
    for arguments, message in (
        # Two levels under another name of the network.
        (("v1", str(workplace.folder / "v2.pt"), wrong, *SMALL, *BLOCKS), "does not fit the network of anofpdm"),
        (("v2", two, wrong), r"for 4 modalities \(BraTS21\) or 1 \(ATLAS\), this one is for 2"),
        ((two, wrong), r"for anofpdm NETWORK \(v2, v1, classifier\) before CHECKPOINT"),
        (("v2", two, wrong, "--classifier", "c"), "`--classifier` is for anofpdm v1"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(["anofpdm", *arguments])
    assert not Path(wrong).exists()


def test_convert_anofpdm_baselines(tmp_path):
    # In this process: starting one takes longer than the work.
    def run(network: str, name: str, out: str, *more):
        assert convert(["anofpdm", network, str(tmp_path / name), str(tmp_path / out), *SMALL, *more]) == 0

    torch.save(original_state_dict("anofpdm/unet_v1", first_convolution(1) | last_convolution(1)), tmp_path / "v1.pt")
    run("v1", "v1.pt", "unguided", *BLOCKS)
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "unguided")
    assert type(pipe).__name__ == "AnoDDPMPipeline" and type(pipe.unet).__name__ == "UNet2DHeadsModel"
    assert pipe.scheduler.config.noise_type == "simplex" and pipe.config.noise_level == 200

    positions = {"out.2.positional_embedding": (64, 64 * 64 + 1)}
    state = original_state_dict("anofpdm/classifier_net", first_convolution(1) | positions)
    torch.save(state, tmp_path / "classifier.pt")
    torch.save(original_state_dict("anofpdm/unet_v1", first_convolution(1) | last_convolution(2)), tmp_path / "ls.pt")
    own = ("--unet.attention_levels", "[1]", "--unet.attention_head_dim", "16")
    run("classifier", "classifier.pt", "classifier", *own)
    guided = ("--classifier", str(tmp_path / "classifier"))
    run("v1", "ls.pt", "guided", *BLOCKS, *guided)
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "guided")
    assert type(pipe).__name__ == "ClassifierGuidedPipeline" and pipe.config.guidance_scale == 500
    weight = pipe.classifier.state_dict()["pool.to_out.weight"]
    torch.testing.assert_close(weight, state["module.out.2.c_proj.weight"][:, :, 0], rtol=0, atol=0)
    pipe.set_progress_bar_config(disable=True)
    slices = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = torch.as_tensor(pipe(slices, noise_level=2).anomaly_map)
    assert torch.isfinite(maps).all() and maps.max() > 0
    for name, more, message in (
        ("ls.pt", (), "name the classifier that guides it"),
        ("v1.pt", guided, "leave `--classifier` out"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(["anofpdm", "v1", str(tmp_path / name), str(tmp_path / "no"), *more])


def test_convert_cimd(tmp_path):
    # As the original saves it, from several devices: the recorded weights, and what they gave for four equal images.
    with np.load(GOLDEN / "cimd" / "unet_tiny.npz", allow_pickle=False) as golden:
        state = {
            name[2:]: torch.from_numpy(golden[name].astype(np.float32)) for name in golden.files if name[:2] == "w."
        }
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "savedmodel.pt")

    def run(name: str, out: str, *more):
        sizes = ("--unet.block_out_channels", "[32, 32]", "--unet.layers_per_block", "1")
        return convert(["cimd", str(tmp_path / name), str(tmp_path / out), *sizes, *BLOCKS, *more])

    assert run("savedmodel.pt", "pipeline") == 0
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipe).__name__ == "CIMDPipeline" and type(pipe.unet).__name__ == "UNet2DHeadsModel"
    assert tuple(pipe.processor.config.modalities) == ("image",) and tuple(pipe.processor.config.value_range) == (0, 1)
    assert pipe.config.threshold == 0.5 and pipe.config.num_inference_steps is None
    own = pipe.unet.state_dict()
    assert len(own) == len(state) + 4 * 2 * 2  # query, key and value of four layers apart
    # Pictures are not transposed, and four equal images are one.
    torch.testing.assert_close(own["conv_out.weight"], state["out.2.weight"], rtol=0, atol=0)
    first = state["input_blocks.0.0.weight"]
    torch.testing.assert_close(own["conv_in.weight"][:, 0], first[:, :4].sum(1))
    torch.testing.assert_close(own["conv_in.weight"][:, 1], first[:, 4], rtol=0, atol=0)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(torch.rand(1, 1, 16, 16), num_ensemble=2, num_inference_steps=3)
    assert torch.isfinite(result.member_maps).all() and result.std_map.max() > 0

    torch.save(dict(state, **{"input_blocks.0.0.weight": first[:, :3]}), tmp_path / "three.pt")
    torch.save({name: tensor for name, tensor in state.items() if name != "out.2.bias"}, tmp_path / "incomplete.pt")
    for name, message in (
        ("three.pt", "first convolution must have 5 channels, .*; there are 3"),
        ("incomplete.pt", "does not fit the network of cimd: .*conv_out.bias"),
    ):
        with pytest.raises(ValueError, match="(?s)" + message):
            run(name, "wrong")
    with pytest.raises(ValueError, match="`unet` has no key layers"):
        run("savedmodel.pt", "wrong", "--unet.layers", "3")
    assert not (tmp_path / "wrong").exists()


def test_a_transposed_classifier_sees_transposed_slices():
    torch.manual_seed(0)
    model = NoisyClassifierModel(
        sample_size=16,
        in_channels=2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_levels=(1,),
        attention_head_dim=16,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    slices, timesteps = torch.randn(2, 2, 16, 16), torch.tensor([3, 40])
    with torch.no_grad():
        expected = model(slices.mT, timesteps).logits
        as_it_was = model(slices, timesteps).logits
        model.load_state_dict(transpose_kernels(model.state_dict()))
        torch.testing.assert_close(model(slices, timesteps).logits, expected, atol=1e-4, rtol=1e-4)
    assert (as_it_was - expected).abs().max() > 1e-2


def timm_resnet(state: dict, images: torch.Tensor) -> torch.Tensor:
    """The forward pass of timm's ResNet with bottlenecks, from its state dict."""
    F = torch.nn.functional

    def convolve(name, number, hidden, **arguments):
        hidden = F.conv2d(hidden, state[f"{name}conv{number}.weight"], **arguments)
        return normalize(f"{name}bn{number}", hidden)

    def normalize(name, hidden):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(hidden, *parts)

    hidden = F.max_pool2d(convolve("", 1, images, stride=2, padding=3).relu(), 3, 2, 1)
    for block in dict.fromkeys(name[: len("layer1.0.")] for name in state if name.startswith("layer")):
        stride = 2 if block.endswith(".0.") and not block.startswith("layer1.") else 1
        inner = convolve(block, 1, hidden).relu()
        inner = convolve(block, 3, convolve(block, 2, inner, stride=stride, padding=1).relu())
        if f"{block}downsample.0.weight" in state:
            hidden = F.conv2d(hidden, state[f"{block}downsample.0.weight"], stride=stride)
            hidden = normalize(f"{block}downsample.1", hidden)
        hidden = (hidden + inner).relu()
    return F.linear(hidden.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def timm_state_dict(outputs: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name, norm, *shape):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{part}"] = torch.rand(shape[0], generator=generator) + 0.2
        state[f"{norm}.num_batches_tracked"] = torch.tensor(3)

    add("conv1", "bn1", 4, 1, 7, 7)
    for stage, (before, width, blocks) in enumerate(((4, 8, 2), (8, 12, 1)), start=1):
        for block in range(blocks):
            name, seen = f"layer{stage}.{block}", before if block == 0 else width
            add(f"{name}.conv1", f"{name}.bn1", width // 4, seen, 1, 1)
            add(f"{name}.conv2", f"{name}.bn2", width // 4, width // 4, 3, 3)
            add(f"{name}.conv3", f"{name}.bn3", width, width // 4, 1, 1)
            if block == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", width, before, 1, 1)
    state["fc.weight"], state["fc.bias"] = torch.randn(outputs, 12, generator=generator), torch.rand(outputs)
    return state


def basic_blocks(outputs: int) -> tuple[ResNetForImageClassification, dict]:
    """A ResNet of basic blocks, as resnet18, and its weights under timm's names."""
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [8, 12], "depths": [2, 1]}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=outputs)
    network, original = ResNetForImageClassification(config), {}
    for name, tensor in network.state_dict().items():
        name = re.sub(r"^resnet\.embedder\.embedder\.convolution\.", "conv1.", name)
        name = re.sub(r"^resnet\.embedder\.embedder\.normalization\.", "bn1.", name)
        name = re.sub(r"^classifier\.1\.", "fc.", name)
        name = re.sub(r"^resnet\.encoder\.stages\.(\d)\.layers", lambda match: f"layer{int(match[1]) + 1}", name)
        name = re.sub(r"\.layer\.(\d)\.convolution", lambda match: f".conv{int(match[1]) + 1}", name)
        name = re.sub(r"\.layer\.(\d)\.normalization", lambda match: f".bn{int(match[1]) + 1}", name)
        name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        original[name] = tensor
    return network.eval(), original


def test_convert_cddpm(tmp_path, monkeypatch):
    # A configuration of one's own in the working directory is not that of the authors.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cddpm.yaml").write_text("method: cddpm\n")
    with np.load(GOLDEN / "sadm" / "cond_unet_tiny.npz", allow_pickle=False) as golden:
        recorded = {name: torch.from_numpy(np.array(golden[name])) for name in golden.files}
    unet = {name[2:]: tensor.float() for name, tensor in recorded.items() if name[:2] == "w/"}
    encoder = timm_state_dict(len(recorded["cond"][0]))
    state = {f"diffusion.model.{name}": tensor for name, tensor in unet.items()}
    state |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    state |= {"diffusion.betas": torch.zeros(1000)}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "last.ckpt")

    def run(method: str, name: str, out: str, *more):
        sizes = ["--unet.block_out_channels", "[32, 32]", "--unet.layers_per_block", "1"]
        sizes += ["--unet.down_block_types", str(["ResnetDownsampleBlock2D"] * 2)]
        sizes += ["--unet.up_block_types", str(["ResnetUpsampleBlock2D"] * 2), "--unet.attention_head_dim", "16"]
        return convert([method, str(tmp_path / name), str(tmp_path / out), *sizes, *more])

    assert run("cddpm", "last.ckpt", "cddpm", "--key", "state_dict", "--modality", "t1") == 0
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "cddpm")
    assert type(pipe).__name__ == "CDDPMPipeline" and tuple(pipe.config.timesteps) == (249, 499, 749)
    assert tuple(pipe.processor.config.modalities) == ("t1",) and pipe.scheduler.config.z is None
    # The original saw transposed slices.
    with torch.no_grad():
        given = (recorded["t"], recorded["cond"])
        torch.testing.assert_close(pipe.unet(recorded["x"].mT, *given).sample.mT, recorded["y"], atol=1e-5, rtol=1e-4)
        images = torch.rand(2, 1, 64, 64)
        codes = pipe.encoder(images).logits
        torch.testing.assert_close(codes, timm_resnet(encoder, images.mT), atol=1e-4, rtol=1e-4)
        assert (codes[0] - codes[1]).abs().max() > 1e-3

    network, basic = basic_blocks(len(encoder["fc.weight"]))
    state = {f"diffusion.model.{name}": tensor for name, tensor in unet.items()}
    torch.save({**state, **{f"encoder.{name}": tensor for name, tensor in basic.items()}}, tmp_path / "basic.pt")
    assert run("cddpm", "basic.pt", "basic") == 0
    with torch.no_grad():
        codes = AnomalyPipeline.from_pretrained(tmp_path / "basic").encoder(images).logits
        torch.testing.assert_close(codes, network(images.mT).logits, atol=1e-5, rtol=1e-4)

    plain = {name: tensor for name, tensor in unet.items() if not name.startswith("label_emb")}
    for name, tensor in plain.items():
        if ".emb_layers.1.weight" in name:
            plain[name] = tensor[:, :128]
    torch.save(plain, tmp_path / "plain.pt")
    for method, kind in (("cddpm", "CDDPMPipeline"), ("pddpm", "PDDPMPipeline")):
        assert run(method, "plain.pt", f"plain_{method}") == 0
        pipe = AnomalyPipeline.from_pretrained(tmp_path / f"plain_{method}")
        assert type(pipe).__name__ == kind and tuple(pipe.config.timesteps) == (499,)
        assert pipe.unet.config.condition_dim is None and "encoder" not in pipe.components or pipe.encoder is None
        torch.testing.assert_close(pipe.unet.conv_out.weight, plain["out.2.weight"].mT, rtol=0, atol=0)

    torch.save(unet, tmp_path / "alone.pt")
    torch.save({name: tensor for name, tensor in plain.items() if name != "out.2.bias"}, tmp_path / "incomplete.pt")
    for method, name, more, message in (
        ("cddpm", "alone.pt", (), "there is no encoder and a condition"),
        ("pddpm", "last.ckpt", ("--key", "state_dict"), "a pddpm neither; there is an encoder and a condition"),
        ("cddpm", "incomplete.pt", (), "does not fit the network of cddpm: .*conv_out.bias"),
        ("cddpm", "plain.pt", ("--modality", "flair"), "`--modality` must be t1 or t2"),
    ):
        with pytest.raises(ValueError, match="(?s)" + message):
            run(method, name, "wrong", *more)
    assert not (tmp_path / "wrong").exists()


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": RunsCode()}, "holds (posix|nt).mkdir, which could run code, and is not opened"),
        (torch.nn.Linear(1, 1), "holds torch.nn.modules.linear.Linear, which could run code"),
        (b"", "no checkpoint of PyTorch, or truncated or damaged"),
        (b"text", "no checkpoint of PyTorch, or truncated or damaged"),
        (pickle.dumps(RunsCode()), "no checkpoint of PyTorch|could run code"),
        ([torch.zeros(1)], "must hold a state dict, name to tensor, got list"),
        (torch.zeros(1), "must hold a state dict, name to tensor, got Tensor"),
        ({}, "keys of the checkpoint: none"),
        ({"epoch": 3, "state_dict": {"a": torch.zeros(1)}}, "with `--key`; keys of the checkpoint: epoch, state_dict"),
        ({"a": torch.tensor([1.0, math.nan])}, "a holds NaN or infinite values"),
        ({"a": torch.tensor([math.inf])}, "a holds NaN or infinite values"),
        ({"a": torch.zeros(1).expand(10**12)}, "a must be a dense tensor, whole in the file"),
        ({"a": torch.zeros(2).to_sparse()}, "a must be a dense tensor, whole in the file"),
    ],
)
def test_hostile_and_damaged_checkpoints_are_refused_in_our_own_words(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("model.pt").write_bytes(content)
    else:
        torch.save(content, "model.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read_weights("model.pt", None)
    # torch advises to open such a file nevertheless.
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert not Path("ran").exists()


def test_checkpoints_that_were_cut_anywhere_are_refused(tmp_path):
    torch.save({"module.a": torch.arange(50.0)}, tmp_path / "model.pt")
    assert torch.equal(read_weights(tmp_path / "model.pt", None)["a"], torch.arange(50.0))
    content = (tmp_path / "model.pt").read_bytes()
    for length in range(0, len(content) - 1, 97):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut.pt is no checkpoint of PyTorch, or truncated or damaged"):
            read_weights(tmp_path / "cut.pt", None)


def test_a_key_that_holds_no_weights_is_refused(tmp_path):
    torch.save({"epoch": 3, "ema": {"a": torch.ones(1)}}, tmp_path / "model.pt")
    assert read_weights(tmp_path / "model.pt", "ema").keys() == {"a"}
    for key in ("epoch", "state_dict"):
        with pytest.raises(ValueError, match=f"no weights under `--key {key}`; keys of the checkpoint: epoch, ema"):
            read_weights(tmp_path / "model.pt", key)
