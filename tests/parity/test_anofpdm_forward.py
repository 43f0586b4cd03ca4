"""The forward process of AnoFPDM, and what is made of it, against arrays recorded from the original program.

Not compared: of `fpdm_select` the pure ablations `last_only`, `interval2`, `ratio`, `grad`, `gradpara`, `fixed_te` and `fixed_thr`; dynamic
clipping (`*dynclip*`, `dyn_*`); DDIM with eta > 0 (`ddim_eta07_*`), which no published run uses. The metrics of
`fpdm_end_to_end` are evaluation.
"""

import re

import pytest
import torch
from diffusers import UNet2DModel
from torch.testing import assert_close

from anodiff import AnoDDPMScheduler, AnoFPDMPipeline, AnoFPDMScheduler, VolumeProcessor
from anodiff.pipelines.postprocessing import median_filter
from anodiff.pipelines.running_maps import RunningMaps, quantile_levels

from .recordings import ToyUNet, load, over, recordings


def predict(unet: ToyUNet, sample, timesteps, label: int) -> torch.Tensor:
    with torch.no_grad():
        return unet(sample, timesteps, torch.full((len(sample),), label)).sample


def make_pipeline(arrays: dict, channels: int, unet=None, **settings) -> AnoFPDMPipeline:
    names = [f"modality{index}" for index in range(channels)]
    settings = {
        "modalities": [names[index] for index in arrays["modality"].tolist()],
        "forward_steps": int(arrays.get("forward_steps", 1)),
        "guidance_scale": float(arrays.get("w", 2.0)),
        "min_component_size": 0,
        **settings,
    }
    scheduler = AnoFPDMScheduler(int(arrays["T"])) if "T" in arrays else AnoFPDMScheduler()
    pipe = AnoFPDMPipeline(unet or ToyUNet(arrays), scheduler, VolumeProcessor(modalities=names), **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def walk(pipe: AnoFPDMPipeline, images, noise, batch_size: int = 16) -> list[torch.Tensor]:
    """x_t, G and U stacked over the steps, the steps first."""
    names = ("guidance_scale", "forward_process", "index_mode", "unguided_branch")
    settings = {name: pipe.config[name] for name in names}
    settings["channels"] = pipe.modality_channels(pipe.config.modalities)
    pipe.scheduler.set_timesteps(pipe.config.forward_steps)
    steps = pipe.walk(images, list(range(len(images))), seed=0, batch_size=batch_size, noise=noise, **settings)
    with torch.no_grad():
        return [torch.stack(parts) for parts in zip(*steps, strict=True)]


@over("anofpdm/schedule*.npz")
def test_schedule(path):
    arrays = load(path)
    for schedule in sorted({name.split("__")[0] for name in arrays}):
        recorded = {name.split("__")[1]: value for name, value in arrays.items() if name.startswith(f"{schedule}__")}
        kind, steps = re.match(r"(lin|cos)(\d+)", schedule).groups()
        exact = dict(rtol=1e-12, atol=0)
        if kind == "cos":  # no published run of AnoFPDM; the same tables serve AnoDDPM
            scheduler = AnoDDPMScheduler(int(steps), beta_schedule="cosine", noise_type="gaussian")
            assert_close(scheduler.betas, recorded["betas"], **exact)
            assert_close(scheduler.variance, recorded["fixed_large_variance"], **exact)
            continue
        scheduler = AnoFPDMScheduler(int(steps))
        kept = recorded["timestep_map"]
        assert_close(scheduler.alphas_cumprod[kept], recorded["alphas_cumprod"], **exact)
        if "_ddim" in schedule:
            scheduler.set_timesteps(stride=int(kept[1] - kept[0]))
            assert scheduler.timesteps.flip(0).tolist() == kept.tolist()
        tables = scheduler._tables
        for ours, theirs in (
            ("original_scale", "sqrt_alphas_cumprod"),
            ("noise_scale", "sqrt_one_minus_alphas_cumprod"),
            ("inverse_scale", "sqrt_recip_alphas_cumprod"),
            ("inverse_noise_scale", "sqrt_recipm1_alphas_cumprod"),
        ):
            # 1 / abar - 1 cancels at t = 0; retained steps of a respaced process went through betas and back.
            assert_close(
                tables[ours][kept], recorded[theirs], rtol=1e-12 if len(kept) == int(steps) else 1e-10, atol=0
            )
        if len(kept) == int(steps):
            assert_close(scheduler.betas, recorded["betas"], **exact)
            assert_close(scheduler.posterior_variance, recorded["posterior_variance"], **exact)
            assert_close(scheduler.posterior_log_variance, recorded["posterior_log_variance_clipped"], **exact)
            assert_close(scheduler.original_weight, recorded["posterior_mean_coef1"], **exact)
            assert_close(scheduler.sample_weight, recorded["posterior_mean_coef2"], **exact)
            levels = tables["level_scale"].square()
            assert_close(levels[:-2], recorded["alphas_cumprod_prev"], **exact)
            assert_close(levels[2:], recorded["alphas_cumprod_next"], **exact)
            variance = AnoDDPMScheduler(int(steps), noise_type="gaussian").variance
            assert_close(variance, recorded["fixed_large_variance"], **exact)


@over("anofpdm/q_sample*.npz")
def test_noising_and_its_inversion(path):
    arrays, scheduler = load(path), AnoFPDMScheduler()
    t, x_t = arrays["t"], arrays["x_t"]
    near = dict(rtol=1e-5, atol=1e-5)
    assert_close(scheduler.add_noise(arrays["x0"], arrays["noise"], t), x_t, **near)
    assert_close(scheduler.posterior_mean(arrays["x0"], t, x_t), arrays["posterior_mean"], **near)
    assert_close(scheduler.posterior_variance[t].float(), arrays["posterior_var"], **near)
    assert_close(scheduler.posterior_log_variance[t].float(), arrays["posterior_logvar"], **near)
    recovered = scheduler.predict_original_sample(arrays["noise"], t, x_t, clip_sample=False)
    # eps is multiplied by 157 at t = 999.
    assert_close(recovered, arrays["xstart_from_eps"], rtol=1e-5, atol=2e-4)
    assert_close(scheduler.predict_epsilon(arrays["x0"], t, x_t), arrays["eps_from_xstart"], **near)


@over("anofpdm/single_steps*.npz")
def test_single_steps(path):
    arrays = load(path)
    unet, scheduler = ToyUNet(arrays), AnoFPDMScheduler(int(arrays["toy_T"]))
    x, t, near = arrays["x"], arrays["t"], dict(rtol=1e-5, atol=2e-4)
    null, *conditional = (predict(unet, x, t, label) for label in (2, 0, 1))
    for output, name in (
        (null, "eps_null"),
        (null, "eps_nolabel"),
        (conditional[0], "eps_y0"),
        (conditional[1], "eps_y1"),
    ):
        assert_close(output, arrays[name], rtol=1e-5, atol=1e-5)

    for name, clip in (("rev_clip", True), ("rev_noclip", False)):
        assert_close(scheduler.encode_step(null, t, x, clip_sample=clip), arrays[f"{name}_sample"], **near)
        original = scheduler.predict_original_sample(null, t, x, clip_sample=clip)
        assert_close(original, arrays[f"{name}_xstart"], **near)
        assert_close(scheduler.predict_epsilon(original, t, x), arrays[f"{name}_eps"], **near)

    for name in (name for name in arrays if re.fullmatch(r"cfg_w\d+_y\d_sample", name)):
        index, label = (int(number) for number in re.findall(r"\d+", name))
        w = float(arrays["ws"][index])
        guided = conditional[label] if w == -1 else (1 + w) * conditional[label] - w * null
        stepped = scheduler.step(guided, t, x)
        # w multiplies differences of two outputs, and 157 the result.
        wide = dict(rtol=1e-5, atol=2e-4 * max(1.0, w))
        assert_close(stepped.pred_original_sample, arrays[name.replace("sample", "xstart")], **wide)
        assert_close(stepped.prev_sample, arrays[name], **wide)

    ddpm = AnoDDPMScheduler(int(arrays["toy_T"]), noise_type="gaussian")
    w = float(arrays["ws"][3])
    for name, output in (("uncond", null), ("cfg", (1 + w) * conditional[0] - w * null)):
        stepped = ddpm.step(output, t, x, variance_noise=arrays[f"ddpm_{name}_noise"])
        assert_close(stepped.prev_sample, arrays[f"ddpm_{name}_sample"], **near)

    epsilon, variance = predict(ToyUNet(arrays, prefix="toyls_"), x, t, 2).chunk(2, 1)
    assert_close(torch.cat([epsilon, variance], 1), arrays["ls_model_out"], rtol=1e-5, atol=1e-5)
    original = scheduler.predict_original_sample(epsilon, t, x)
    assert_close(original, arrays["ls_xstart"], **near)
    assert_close(scheduler.posterior_mean(original, t, x), arrays["ls_mean"], **near)
    log_variance = scheduler.learned_log_variance(variance, t)
    assert_close(log_variance, arrays["ls_log_variance"], rtol=1e-5, atol=1e-5)
    assert_close(log_variance.exp(), arrays["ls_variance"], rtol=1e-5, atol=1e-5)

    # The respaced process of as many base steps.
    schedule = load(recordings("anofpdm/schedule*.npz")[0])
    [name] = [name for name in schedule if re.fullmatch(rf"lin{len(scheduler)}_ddim\d+__timestep_map", name)]
    kept = schedule[name]
    scheduler.set_timesteps(stride=int(kept[1] - kept[0]))
    spaced = kept[arrays["spaced_t"]]
    null, healthy = (predict(unet, x, spaced, label) for label in (2, 0))
    stepped = scheduler.step((1 + w) * healthy - w * null, spaced, x)
    assert_close(stepped.pred_original_sample, arrays["spaced_cfg_xstart"], **near)
    assert_close(stepped.prev_sample, arrays["spaced_cfg_sample"], **near)
    assert_close(scheduler.encode_step(null, spaced, x), arrays["spaced_rev_sample"], **near)
    assert_close(scheduler.predict_original_sample(null, spaced, x), arrays["spaced_rev_xstart"], **near)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@over("anofpdm/fpdm_forward_*.npz")
def test_forward_process(path, batch_size):
    arrays = load(path)
    random = "noise" in arrays
    pipe = make_pipeline(arrays, arrays["x0"].shape[1], forward_process="random" if random else "ddim")
    noise = arrays["noise"] if random else arrays["noise_t0"][None]
    sample, guided, unguided = walk(pipe, arrays["x0"], noise, batch_size)
    # Guidance multiplies what rounding leaves of a difference of two outputs.
    near = dict(rtol=0, atol=2e-4 if pipe.config.guidance_scale > 10 else 1e-4)
    assert_close(sample, arrays["x_t"], **near)
    assert_close(guided.transpose(0, 1), arrays["xstart"], **near)
    assert_close(unguided.transpose(0, 1), arrays["xstart_null"], **near)


@over("anofpdm/fpdm_forward_ddim*.npz")
def test_duplicate_evaluations_are_left_out(path):
    arrays = load(path)
    unet, evaluations = ToyUNet(arrays), []
    forward = unet.forward
    unet.forward = lambda sample, *rest: evaluations.append(len(sample)) or forward(sample, *rest)
    pipe = make_pipeline(arrays, arrays["x0"].shape[1], unet)
    count, steps = len(arrays["x0"]), pipe.config.forward_steps
    walk(pipe, arrays["x0"], arrays["noise_t0"][None])
    assert int(arrays["n_model_calls"]) == 4 * steps - 1
    assert sum(evaluations) == (3 * steps - 1) * count and len(evaluations) == 2 * steps - 1


@pytest.mark.parametrize("variant", ["default", "nomedian"])
@over("anofpdm/fpdm_select*.npz")
def test_selection(path, variant):
    arrays = load(path)
    recorded = {name.split("__")[1]: value for name, value in arrays.items() if name.startswith(f"{variant}__")}
    median = 0 if variant == "nomedian" else 5
    channels = arrays["source"].shape[1]
    blocks = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unused = UNet2DModel(in_channels=channels, out_channels=channels, norm_num_groups=4, **blocks)
    pipe = make_pipeline(arrays, channels, unused, median_size=median)
    guided, unguided = (arrays[name].transpose(0, 1) for name in ("xstart", "xstart_null"))
    running = RunningMaps(arrays["source"][:, arrays["modality"]], len(guided))
    for step, pair in enumerate(zip(guided, unguided, strict=True)):
        running.update(slice(None), step, *pair)
    assert_close(running.gap, arrays["diff_flat"], rtol=1e-5, atol=1e-7)
    assert torch.equal(running.best_step, recorded["t_e"])
    assert_close(running.similarity(), recorded["cos_sim"], rtol=0, atol=1e-6)
    labels = (running.similarity() <= arrays["thr_01"]).long()
    assert torch.equal(labels, recorded["pred_lab"])

    masks, levels, thresholds = pipe.segment(
        running.maps,
        running.best_gap,
        arrays["source"],
        tuple(arrays["diff_max"].tolist()),
        pipe.config.quantile_range,
        "image",
    )
    maps = running.maps.mean(1)
    if "amap_before_median" in recorded:
        assert_close(maps, recorded["amap_before_median"][:, 0], rtol=0, atol=1e-6)
    if median:
        maps = torch.from_numpy(median_filter(maps.numpy(), median, 2, border="mirror"))
    assert_close(maps, recorded["amap"][:, 0], rtol=0, atol=1e-6)
    assert_close(levels, recorded["quantile_level"], rtol=0, atol=0)
    assert_close(thresholds, recorded["quantile_value"].mean(1), rtol=0, atol=1e-6)
    assert torch.equal(masks, recorded["mask_all"][:, 0].bool())
    assert torch.equal(masks & labels.bool()[:, None, None], recorded["mask"][:, 0].bool())


@over("anofpdm/quantile_index*.npz")
def test_quantile_levels(path):
    arrays = load(path)
    gaps = arrays["diff_max_value"][:, None]
    levels = quantile_levels(gaps, [float(arrays["diff_max_ref"])], (0.90, 0.98))[:, 0]
    assert torch.equal(levels, arrays["quantile_level"])
    assert torch.equal(levels, arrays["quant_range"][arrays["index"]])


@over("anofpdm/fpdm_end_to_end*.npz")
def test_chain_with_the_calibrated_values(path):
    arrays = load(path)
    images, noise = arrays["x0"], arrays["noise_t0"][None]
    calibrated = dict(
        similarity_threshold=float(arrays["thr_01"]), gap_scale=arrays["diff_max"].tolist(), gate_by_label=False
    )
    pipe = make_pipeline(arrays, images.shape[1], **calibrated)
    numbers = list(range(len(images)))
    running = RunningMaps(images[:, arrays["modality"]], pipe.config.forward_steps)
    for step, (_, guided, unguided) in enumerate(zip(*walk(pipe, images, noise), strict=True)):
        running.update(slice(None), step, guided, unguided)
    for ours, theirs in (("guided_error", "mse"), ("unguided_error", "mse_null"), ("gap", "diff")):
        assert_close(getattr(running, ours), arrays[theirs], rtol=0, atol=1e-5)
    assert_close(running.similarity(), arrays["cos_sim"], rtol=0, atol=1e-5)

    def compute(**settings):
        settings = {**pipe.default_settings(), **settings}
        return pipe.compute_maps(images, numbers, seed=0, batch_size=3, noise=noise, **settings)

    results, gated = compute(), compute(gate_by_label=True)
    assert torch.equal(results.details["t_e"], arrays["t_e"])
    assert torch.equal(results.details["label"], arrays["pred_lab"])
    assert_close(results.details["quantile"], arrays["quantile_level"], rtol=0, atol=0)
    assert_close(results.details["mask_threshold"], arrays["quantile_value"].mean(1), rtol=0, atol=1e-4)
    assert_close(results.maps, arrays["amap_before_median"][:, 0], rtol=0, atol=1e-4)
    filtered = torch.from_numpy(median_filter(results.maps.numpy(), pipe.config.median_size, 2, border="mirror"))
    assert_close(filtered, arrays["amap"][:, 0], rtol=0, atol=1e-4)
    assert torch.equal(results.masks, arrays["mask_all"][:, 0].bool())
    assert torch.equal(gated.masks, arrays["mask"][:, 0].bool())

    # The default drops components of 40 pixels and fewer.
    pipe = make_pipeline(arrays, images.shape[1], min_component_size=41, **calibrated)
    assert torch.equal(compute(gate_by_label=True).masks, arrays["mixed_mask"][:, 0].bool())
    assert torch.equal(compute().masks[arrays["lab"] == 1], arrays["unhealthy_mask"][:, 0].bool())
