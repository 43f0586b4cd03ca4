"""CIMD's tables, steps, ensembles and network against arrays recorded from the original program: every array of these files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anodiff import CIMDPipeline, CIMDScheduler, UNet2DHeadsModel, VolumeProcessor
from anodiff.convert.cimd import fold_image_channels
from anodiff.pipelines.pipeline_cimd import summarize_members

from .recordings import ToySegmentationUNet, load, network_sizes, over, unet_levels


# Tables of a step: our name -> name of the recording.
STEP_TABLES = {
    "beta": "betas",
    "log_beta": "max_log",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance": "posterior_log_variance_clipped",
    "original_weight": "posterior_mean_coef1",
    "sample_weight": "posterior_mean_coef2",
}


def make_pipeline(arrays: dict, steps: int, **settings) -> CIMDPipeline:
    processor = VolumeProcessor(value_range=(0.0, 1.0), brain_mask="none")
    pipe = CIMDPipeline(ToySegmentationUNet(arrays, steps), CIMDScheduler(steps), processor, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_recorded_grid(scheduler: CIMDScheduler, rising: torch.Tensor, steps: int | None) -> None:
    """By the number of steps, or without one by the timesteps themselves; either way they must be the recorded ones."""
    scheduler.set_timesteps(steps, timesteps=None if steps else rising.flip(0).tolist())
    assert torch.equal(scheduler.timesteps.flip(0), rising)


@over("cimd/schedules*.npz")
def test_schedules(path):
    arrays = load(path)
    tags = sorted({name.split(".")[0] for name in arrays})
    assert tags
    for tag in tags:
        recorded = {name.split(".")[1]: values for name, values in arrays.items() if name.startswith(f"{tag}.")}
        kind, _, respacing = tag.partition("_")
        scheduler = CIMDScheduler(int(kind[3:]), {"lin": "linear", "cos": "cosine"}[kind[:3]])
        # `ddimK` is a grid of its own, and several section counts are several grids: given by their timesteps.
        single = respacing[1:] if respacing.startswith("r") and respacing[1:].isdigit() else None
        if respacing:
            set_recorded_grid(scheduler, recorded["timestep_map"], int(single) if single else None)
        else:
            assert torch.equal(scheduler.timesteps.flip(0), recorded["timestep_map"])
        kept = recorded["timestep_map"]
        for name, other in STEP_TABLES.items():
            torch.testing.assert_close(scheduler.step_tables[name], recorded[other], rtol=1e-12, atol=0)
        levels = scheduler.alphas_cumprod[kept]
        for values, other in (
            (levels, "alphas_cumprod"),
            (levels.sqrt(), "sqrt_alphas_cumprod"),
            ((1 - levels).sqrt(), "sqrt_one_minus_alphas_cumprod"),
            ((1 / levels).sqrt(), "sqrt_recip_alphas_cumprod"),
            ((1 / levels - 1).sqrt(), "sqrt_recipm1_alphas_cumprod"),
            (scheduler.step_tables["previous_scale"] ** 2, "alphas_cumprod_prev"),
        ):
            torch.testing.assert_close(values, recorded[other], rtol=1e-12, atol=0)


@over("cimd/q_sample*.npz")
def test_forward_process(path):
    arrays = load(path)
    scheduler = CIMDScheduler()
    x0, t = arrays["x0"].double(), arrays["t"]
    sample = scheduler.add_noise(x0, arrays["noise"], t)
    shape = (len(t), 1, 1, 1)
    levels = scheduler.alphas_cumprod[t].reshape(shape)
    for actual, expected in (
        (sample, "x_t"),
        (scheduler.posterior_mean(x0, t, arrays["x_t"]), "posterior_mean"),
        (scheduler.step_tables["posterior_variance"][t].reshape(shape), "posterior_variance"),
        (scheduler.learned_log_variance(torch.full_like(x0, -1.0), t), "posterior_log_variance_clipped"),
        (levels.sqrt() * x0, "q_mean"),
        (1 - levels, "q_variance"),
        ((1 - levels).log(), "q_log_variance"),
    ):
        recorded = arrays[expected].double()
        torch.testing.assert_close(actual.expand_as(recorded), recorded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
@over("cimd/p_step*.npz")
def test_reverse_step(path, clip):
    arrays = load(path)
    scheduler = CIMDScheduler(int(arrays["T"]), clip_range=(-1.0, 1.0) if clip else None)
    image, mask, t = arrays["image"], arrays["x_mask"], arrays["t"]
    with torch.no_grad():
        model_output = ToySegmentationUNet(arrays, len(scheduler))(torch.cat([image, mask], 1), t).sample
    torch.testing.assert_close(model_output, arrays["model_output"], rtol=0, atol=1e-6)
    recorded = {name: arrays[f"clip{int(clip)}.{name}"] for name in ("log_variance", "variance", "sample", "mean")}
    log_variance = scheduler.learned_log_variance(arrays["model_output"][:, 1:], t)
    torch.testing.assert_close(log_variance, recorded["log_variance"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_variance.exp(), recorded["variance"], rtol=1e-5, atol=1e-6)
    for noise, name in ((arrays["noise"], "sample"), (torch.zeros_like(mask), "mean")):
        output = scheduler.step(arrays["model_output"], t, mask, variance_noise=noise)
        # Without limits x_0 of the largest t reaches hundreds, and so does what is rounded.
        torch.testing.assert_close(output.prev_sample, recorded[name], rtol=1e-6, atol=1e-6 if clip else 2e-6)
        original = arrays[f"clip{int(clip)}.pred_xstart"]
        torch.testing.assert_close(output.pred_original_sample, original, rtol=0, atol=1e-6 if clip else 1e-4)


@over("cimd/ensemble*.npz")
def test_ensembles(path):
    arrays = load(path)
    steps, count, members = int(arrays["T_model"]), int(arrays["num_steps"]), len(arrays["final"])
    pipe = make_pipeline(arrays, steps, num_ensemble=members, num_inference_steps=count)
    scheduler = pipe.scheduler
    set_recorded_grid(scheduler, arrays["timestep_map"], count)

    # Every step of each member by itself, as they were recorded.
    for member in range(members):
        sample = arrays["init_noise"][member : member + 1]
        for step, t in enumerate(scheduler.timesteps):
            with torch.no_grad():
                model_output = pipe.unet(torch.cat([arrays["image"], sample], 1), t).sample
            output = scheduler.step(model_output, t, sample, variance_noise=arrays["step_noise"][member, step][None])
            largest, sample = sample.abs().max(), output.prev_sample
            torch.testing.assert_close(sample[0, 0], arrays["trajectory"][member, step], rtol=0, atol=1e-5)
            # At the first steps x_0 is the difference of two numbers of some hundreds: an ulp of those is more than 1e-5.
            ulp = float(2.0**-23 * largest / scheduler.alphas_cumprod[t].sqrt())
            original = arrays["pred_xstart"][member, step]
            torch.testing.assert_close(output.pred_original_sample[0, 0], original, rtol=0, atol=max(1e-5, 2 * ulp))
        torch.testing.assert_close(sample[0, 0], arrays["final"][member], rtol=0, atol=1e-5)

    # The pipeline, in batches that are not full. It keeps what lies in [0, 1]; no threshold sees the rest.
    noise = torch.cat([arrays["init_noise"][:, None], arrays["step_noise"]], 1).flatten(0, 1)[:, None]
    for batch_size in (1, 3, 16):
        results = {
            threshold: pipe(arrays["image"], noise=noise, batch_size=batch_size, threshold=threshold)
            for threshold in (None, 0.5, 0.0)
        }
        for result in results.values():
            torch.testing.assert_close(result.member_maps[:, 0], arrays["final"].clamp(0.0, 1.0), rtol=0, atol=1e-5)
        for threshold, masks in ((0.5, "masks_gt_0_5"), (0.0, "masks_gt_0")):
            # In a batch, values are rounded otherwise than alone: those on the threshold may fall to either side.
            clear = (arrays["final"] - threshold).abs() > (0.0 if batch_size == 1 else 1e-5)
            found = results[threshold].member_masks[:, 0].bool()
            assert torch.equal(found[clear], arrays[masks][clear])
        clear = ((arrays["final"] - 0.5).abs() > 1e-5).all(0)
        assert torch.equal(results[None].majority_mask[0].bool()[clear], arrays["vote_0_5"][clear])

    # Mean and deviation of the raw members.
    summary = summarize_members(arrays["final"], 0.5)
    torch.testing.assert_close(summary["mean_map"], arrays["ensemble_mean"], rtol=0, atol=1e-6)
    torch.testing.assert_close(summary["std_map"], arrays["ensemble_std"], rtol=0, atol=1e-6)
    assert torch.equal(summary["majority_mask"].bool(), arrays["vote_0_5"])


@over("cimd/loop_known*.npz")
def test_loop_of_the_whole_chain(path, tmp_path):
    """A thousand steps magnify how a processor rounds: on an Intel one, MKL's code for it made 3e-4 of it. So the chain
    runs in a process whose MKL does not take code for one kind of processor."""
    arrays, made = load(path), tmp_path / "maps.pt"
    settings = {**os.environ, "MKL_CBWR": "COMPATIBLE"}
    subprocess.run([sys.executable, "-c", CHAIN, path, made], env=settings, check=True)
    maps = torch.load(made)
    torch.testing.assert_close(maps, arrays["final"].clamp(0.0, 1.0), rtol=0, atol=1e-5)
    assert float((maps > 0.5).double().mean()) == float(arrays["frac_gt_0_5"])
    assert float((maps > 0).double().mean()) == float(arrays["frac_gt_0"])


CHAIN = """
import sys, torch
from pathlib import Path
from anodiff.tests.parity.test_cimd_sampling import run_chain
torch.save(run_chain(Path(sys.argv[1])), sys.argv[2])
"""


def run_chain(path: Path) -> torch.Tensor:
    """Runs a recorded chain of as many steps as its file's name says, with the noise of its formula."""
    arrays = load(path)
    image, coefficients = arrays["image_f16"].float(), arrays["noise_coeffs"]
    steps = int(path.stem.split("_")[-1])
    k = torch.arange(steps + 1, dtype=torch.float64)[:, None, None]
    i = torch.arange(image.shape[2], dtype=torch.float64)[:, None]
    j = torch.arange(image.shape[3], dtype=torch.float64)
    a0, a1, a2, a3 = coefficients
    noise = (2**0.5 * (a0 * k + a1 * i + a2 * j + a3 * i * j).cos()).float()
    pipe = make_pipeline(arrays, steps)
    settings = {**pipe.default_settings(), "num_ensemble": 1}
    return pipe.compute_maps(image, [0], noise=noise[:, None, None], **settings).maps


@over("cimd/unet*.npz")
def test_network(path):
    arrays = load(path)
    state = {name[2:]: values.float() for name, values in arrays.items() if name.startswith("w.")}
    sizes, attention = network_sizes(state, unet_levels(state))
    assert arrays["attention_ds"].tolist() == [2**level for level, attends in enumerate(attention) if attends]
    channels = sizes.pop("in_channels")
    sizes |= dict(
        sample_size=arrays["x"].shape[-1],
        out_channels=arrays["y"].shape[1],
        down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        downsample_type="conv",
        upsample_type="conv",
        flip_sin_to_cos=True,
        num_attention_heads=int(arrays["num_heads"]),
    )
    unet = UNet2DHeadsModel(in_channels=channels, **sizes).eval()
    unet.load_state_dict(unet.convert_original_state_dict(state))
    with torch.no_grad():
        torch.testing.assert_close(unet.time_proj(arrays["t"]), arrays["time_embedding"], rtol=0, atol=1e-5)
        torch.testing.assert_close(unet(arrays["x"], arrays["t"]).sample, arrays["y"], rtol=0, atol=1e-5)

        # Four equal images are one image to a network with the sum of their weights.
        folded = UNet2DHeadsModel(in_channels=2, **sizes).eval()
        folded.load_state_dict(folded.convert_original_state_dict(fold_image_channels(state)))
        image, mask = arrays["x"][:, :1], arrays["x"][:, 4:]
        expected = unet(torch.cat([image.repeat(1, 4, 1, 1), mask], 1), arrays["t"]).sample
        actual = folded(torch.cat([image, mask], 1), arrays["t"]).sample
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (expected - arrays["y"]).abs().max() > 2e-5  # the recorded images are not equal
