"""cDDPM, DDPM_2D and pDDPM against arrays recorded from the original programs.

Not compared: `box_*inpaint0` of `pddpm` (no published run), and `latent` of `ensemble`, a mean that nothing uses. `pred_noise` of
`onestep` is no objective here, since no published run predicts noise; its numbers follow from the scheduler's.
"""

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch.testing import assert_close
from transformers import PretrainedConfig, PreTrainedModel

from anodiff import AnoDDPMScheduler, CDDPMPipeline, ConditionedUNet2DModel, PDDPMPipeline, VolumeProcessor
from anodiff.pipelines.one_step import encode_slices
from anodiff.pipelines.pipeline_pddpm import box_masks, boxes_at, patch_grid, patch_weights
from anodiff.pipelines.ssim import ssim_map
from anodiff.schedulers.draws import make_keys
from anodiff.schedulers.simplex import OctaveSimplexNoise, opensimplex2, permutation_tables
from anodiff.training.objective_cddpm import DDPM2DObjective, PDDPMObjective, reconstruction_loss

from .recordings import load, over


class Output:
    def __init__(self, **values):
        vars(self).update(values)


class ToyUNet(UNet2DModel):
    """tanh(conv2d(x, W) + t / T * b + c E), the last term with a condition only."""

    @register_to_config
    def __init__(self, condition_dim: int | None = None, in_channels: int = 1, out_channels: int = 1):
        torch.nn.Module.__init__(self)

    def fill(self, arrays: dict):
        self.weight = torch.nn.Parameter(arrays["toy_W"])
        self.bias, self.steps = arrays["toy_b"], float(arrays["toy_T"])
        self.code = arrays.get("toy_E")
        return self

    def forward(self, sample, timesteps, class_labels=None):
        hidden = torch.nn.functional.conv2d(sample, self.weight, padding=1)
        hidden = hidden + (timesteps / self.steps * self.bias).reshape(-1, 1, 1, 1)
        if class_labels is not None:
            hidden = hidden + (class_labels @ self.code)[:, :, None, None]
        return Output(sample=torch.tanh(hidden))


class ToyEncoder(PreTrainedModel):
    def __init__(self, matrix: torch.Tensor):
        super().__init__(PretrainedConfig(num_labels=matrix.shape[1]))
        self.matrix = torch.nn.Parameter(matrix)
        self.calls = 0

    def forward(self, images):
        self.calls += len(images)
        return Output(logits=torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.matrix)


def make_scheduler(steps: int = 1000, **settings) -> AnoDDPMScheduler:
    return AnoDDPMScheduler(num_train_timesteps=steps, **{"beta_schedule": "cosine", "z": None, **settings})


def make_processor(size: int | None = None) -> VolumeProcessor:
    return VolumeProcessor(size=None if size is None else (size, size), intensity="given", value_range=(0.0, 1.0))


def timesteps_of(steps: torch.Tensor) -> list[int]:
    """Returns timesteps that begin with 0 for recorded ones that begin with 1."""
    return (steps.reshape(-1) - 1).tolist()


def make_pipeline(arrays: dict, encoder: ToyEncoder | None = None, **settings) -> CDDPMPipeline:
    unet = ToyUNet(condition_dim=None if encoder is None else encoder.config.num_labels).fill(arrays)
    pipe = CDDPMPipeline(unet, make_scheduler(int(arrays["toy_T"])), make_processor(), encoder, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_slices(volume: torch.Tensor) -> torch.Tensor:
    """(1, 1, H, W, D) to (D, 1, H, W)."""
    return volume[0].permute(3, 0, 1, 2)


@over("sadm/schedule*.npz")
def test_schedule(path):
    arrays = load(path)
    linear = {"beta_schedule": "linear"}
    for prefix, steps, settings in (
        ("cosine_", int(arrays["T"]), {}),
        ("small_", int(arrays["T_small"]), {}),
        ("linear_", int(arrays["T_small"]), linear),
    ):
        scheduler = make_scheduler(steps, **settings)
        abar = scheduler.alphas_cumprod
        assert_close(abar.float(), arrays[f"{prefix}alphas_cumprod"], rtol=1e-6, atol=1e-12)
        if f"{prefix}betas64" in arrays:
            assert_close(scheduler.betas, arrays[f"{prefix}betas64"], rtol=1e-10, atol=0)
        if settings:
            continue
        previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        for name, values in (
            ("betas", scheduler.betas),
            ("alphas_cumprod_prev", previous),
            ("sqrt_alphas_cumprod", abar.sqrt()),
            ("sqrt_one_minus_alphas_cumprod", (1 - abar).sqrt()),
            ("posterior_variance", scheduler.posterior_variance),
            ("posterior_mean_coef1", scheduler.original_weight),
            ("posterior_mean_coef2", scheduler.sample_weight),
        ):
            golden = arrays[prefix + name]
            assert_close(values.float()[:-1], golden[:-1], rtol=1e-6, atol=1e-12)
            # The last abar is almost 0; the original rounded it to float32.
            assert_close(values.float()[-1], golden[-1], rtol=1e-4, atol=1e-12)
        gamma = float(arrays["p2_gamma_small"]) if prefix == "small_" else 0.0
        assert_close(((1 - abar) ** gamma).float(), arrays[f"{prefix}p2_loss_weight"], rtol=1e-6, atol=0)
    assert_close(make_scheduler(int(arrays["T"])).betas, arrays["betas64"], rtol=1e-10, atol=1e-14)


@over("sadm/onestep*.npz")
def test_one_step_and_its_loss(path):
    arrays = load(path)
    unet, scheduler = ToyUNet().fill(arrays), make_scheduler(int(arrays["toy_T"]))
    images, noise = arrays["x"], arrays["noise"]
    target = 2 * images - 1
    for number, t in enumerate(arrays["tlist"]):
        timesteps = t.expand(len(images))
        sample = scheduler.add_noise(target, noise, timesteps)
        assert_close(sample, arrays["x_t"][number], rtol=0, atol=1e-6)
        for condition in ("cond", "uncond"):
            with torch.no_grad():
                prediction = unet(sample, timesteps, arrays["cond"] if condition == "cond" else None).sample
            recorded = [kind for kind in ("l1", "l2") if f"loss_pred_x0_{kind}_{condition}" in arrays]
            assert "l1" in recorded
            for kind in recorded:
                loss = reconstruction_loss(target, prediction, kind).mean()
                assert_close(loss, arrays[f"loss_pred_x0_{kind}_{condition}"][number], rtol=1e-6, atol=1e-6)
                reconstruction = arrays[f"reco_pred_x0_{kind}_{condition}"][number]
                assert_close((prediction + 1) / 2, reconstruction, rtol=0, atol=1e-6)
            for kind in ("l1", "l2") if f"loss_pred_noise_l1_{condition}" in arrays else ():
                loss = reconstruction_loss(noise, prediction, kind).mean()
                assert_close(loss, arrays[f"loss_pred_noise_{kind}_{condition}"][number], rtol=1e-6, atol=1e-6)
                # The original forgets to divide by sqrt(abar).
                original = scheduler.predict_original_sample(prediction.double(), timesteps, sample.double())
                original = original * scheduler.alphas_cumprod[t].sqrt()
                reconstruction = arrays[f"reco_pred_noise_{kind}_{condition}"][number].double()
                assert_close((original + 1) / 2, reconstruction, rtol=0, atol=1e-5)


@over("sadm/onestep*.npz")
def test_weighted_loss_of_the_training(path, monkeypatch):
    arrays = load(path)
    names = [name for name in arrays if name.startswith("train_loss_p2gamma")]
    assert len(names) == 1
    digits = names[0].removeprefix("train_loss_p2gamma")
    scheduler = make_scheduler(int(arrays["toy_T"]))
    inference = {"timesteps": arrays["train_t"].unique().tolist()}
    objective = DDPM2DObjective(
        ToyUNet().fill(arrays), scheduler, make_processor(), inference, p2_gamma=float(f"{digits[0]}.{digits[1:]}")
    )
    # The recorded draws instead of those of the keys.
    monkeypatch.setattr("anodiff.training.objective_cddpm.draw_timesteps", lambda *args: arrays["train_t"])
    monkeypatch.setattr(scheduler, "draw_noise", lambda *args: arrays["noise"])

    predictions = []

    def conditioned(sample, timesteps):
        predictions.append(objective.model(sample, timesteps, arrays["cond"]))
        return predictions[-1]

    loss = objective.loss(conditioned, {"image": arrays["x"]}, make_keys(0, range(len(arrays["x"]))))
    assert_close(loss.mean(), arrays[names[0]], rtol=1e-6, atol=1e-6)
    assert_close((predictions[0].sample + 1) / 2, arrays["train_reco"], rtol=0, atol=1e-6)


@over("sadm/ensemble*.npz")
def test_reconstruction_of_a_volume(path):
    arrays = load(path)
    slices = as_slices(arrays["vol"])
    numbers = list(range(len(slices)))

    def reconstruct(pipe, slices, noise, numbers, batch_size):
        settings = pipe.default_settings()
        return pipe.compute_maps(slices, numbers, seed=0, batch_size=batch_size, noise=noise, **settings)

    encoder = ToyEncoder(arrays["enc_M"])
    ensemble, single = timesteps_of(arrays["step_ensemble"]), timesteps_of(arrays["test_timesteps"])
    assert arrays["t_ens"].unique(dim=1).flatten().tolist() == ensemble
    assert arrays["t_single"].unique().tolist() == single
    for noise, timesteps, golden in (
        (arrays["noise_ens"], ensemble, arrays["reco_ens_volume"]),
        (arrays["noise_single"][None], single, arrays["reco_single_volume"]),
    ):
        conditioned = make_pipeline(arrays, encoder, timesteps=timesteps)
        assert_close(encode_slices(conditioned, slices, 2), arrays["features"], rtol=0, atol=1e-6)
        for batch_size in (1, 4, 64):
            encoder.calls = 0
            results = reconstruct(conditioned, slices, noise, numbers, batch_size)
            assert encoder.calls == len(slices)
            assert_close(results.reconstruction, as_slices(golden), rtol=0, atol=1e-6)
            assert_close(results.maps, (slices - as_slices(golden)).abs()[:, 0], rtol=0, atol=2e-6)

    [name] = [name for name in arrays if name.startswith("reco_uncond_center")]
    centre = as_slices(arrays[name])
    start = (len(slices) - len(centre)) // 2
    chosen = slices[start : start + len(centre)]
    noise = arrays[f"noise_uncond_center{len(centre)}"][None]
    numbers = list(range(len(centre)))
    results = reconstruct(make_pipeline(arrays, timesteps=single), chosen, noise, numbers, 8)
    assert_close(results.reconstruction, centre, rtol=0, atol=1e-6)


@over("sadm/ensemble*.npz")
def test_anomaly_score_of_the_last_pass(path):
    """What the original calls `anomaly_reg`: the training loss at the last of the timesteps."""
    arrays = load(path)
    slices, last = as_slices(arrays["vol"]), timesteps_of(arrays["step_ensemble"][-1])
    pipe = make_pipeline(arrays, ToyEncoder(arrays["enc_M"]), timesteps=last)
    results = pipe.compute_maps(
        slices, list(range(len(slices))), noise=arrays["noise_ens"][-1:], **pipe.default_settings()
    )
    loss = reconstruction_loss(2 * slices - 1, 2 * results.reconstruction - 1).mean()
    assert_close(loss, arrays["anomaly_reg"], rtol=1e-6, atol=1e-6)


@over("sadm/cond_unet_tiny*.npz")
def test_conditioned_unet(path):
    arrays = load(path)
    levels = len(arrays["mult"])
    model = ConditionedUNet2DModel(
        in_channels=arrays["x"].shape[1],
        out_channels=arrays["y"].shape[1],
        block_out_channels=tuple((int(arrays["model_channels"]) * arrays["mult"]).tolist()),
        layers_per_block=int(arrays["num_res_blocks"]),
        down_block_types=("ResnetDownsampleBlock2D",) * levels,
        up_block_types=("ResnetUpsampleBlock2D",) * levels,
        attention_head_dim=int(arrays["num_head_channels"]),
        condition_dim=int(arrays["cond_dim"]),
    ).eval()
    state = {name[2:]: values.float() for name, values in arrays.items() if name.startswith("w/")}
    model.load_state_dict(model.convert_original_state_dict(state))
    with torch.no_grad():
        sinusoid = model.time_proj(arrays["t"])
        assert_close(sinusoid, arrays["time_sinusoid"], rtol=0, atol=1e-5)
        assert_close(
            model.time_embedding(sinusoid) + model.class_embedding(arrays["cond"]),
            arrays["emb_concat"],
            rtol=0,
            atol=1e-5,
        )
        assert_close(model(arrays["x"], arrays["t"], arrays["cond"]).sample, arrays["y"], rtol=0, atol=1e-5)


@over("sadm/pddpm*.npz")
def test_boxes(path):
    arrays = load(path)
    height, width = int(arrays["H"]), int(arrays["W"])
    patch, larger = int(arrays["patch"]), int(arrays["patch_overlap"])
    assert patch_grid(height, width, patch).equal(arrays["grid"])
    overlapping = patch_grid(height, width, larger, "cut")
    assert overlapping.equal(arrays["grid_overlap"])
    [published] = [name for name in arrays if name.startswith("grid_") and name[5].isdigit()]
    size, side = map(int, published.split("_")[1:])
    assert patch_grid(size, size, side).equal(arrays[published])
    # What is kept of overlapping patches is what lies in boxes beside each other, which hang over the border.
    cut = patch_weights(box_masks(overlapping, height, width), "cut")
    assert cut.equal(box_masks(arrays["grid_overlap_cut"], height, width).float())
    # Corners are drawn from the whole slice, left before top.
    torch.manual_seed(int(arrays["single_seed"]))
    count = len(arrays["single_box"])
    left, top = torch.randint(0, width, (count, 1))[:, 0], torch.randint(0, height, (count, 1))[:, 0]
    assert boxes_at(left, top, patch).equal(arrays["single_box"][..., 0])


@over("sadm/pddpm*.npz")
def test_patched_training(path, monkeypatch):
    arrays = load(path)
    scheduler = make_scheduler(int(arrays["toy_T"]))
    inference = {"patch_size": int(arrays["patch"]), "timesteps": [int(arrays["t"])]}
    unet, processor = ToyUNet().fill(arrays), make_processor(int(arrays["H"]))
    objective = PDDPMObjective(unet, scheduler, processor, inference)
    seen = []

    def recording(sample, timesteps):
        seen.append((sample, unet(sample, timesteps).sample))
        return Output(sample=seen[-1][1])

    count = len(arrays["x"])
    monkeypatch.setattr("anodiff.training.objective_cddpm.draw_timesteps", lambda *args: arrays["t"].expand(count))
    monkeypatch.setattr(scheduler, "draw_noise", lambda *args: arrays["noise"])
    monkeypatch.setattr("anodiff.training.objective_cddpm.draw_boxes", lambda *args: arrays["box"])
    loss = objective.loss(recording, {"image": arrays["x"]}, make_keys(0, range(len(arrays["x"]))))
    assert_close(seen[0][0], arrays["box_xt"], rtol=0, atol=1e-6)
    assert_close(loss.mean(), arrays["box_loss_inpaint1"], rtol=1e-6, atol=1e-6)
    inside = box_masks(arrays["box"], int(arrays["H"]), int(arrays["W"]))[:, None]
    pasted = torch.where(inside, (seen[0][1] + 1) / 2, arrays["x"])
    assert_close(pasted, arrays["box_reco_inpaint1"], rtol=0, atol=1e-6)


@over("sadm/pddpm*.npz")
def test_patched_reconstruction(path):
    arrays = load(path)
    slices = as_slices(arrays["vol"])
    scheduler = make_scheduler(int(arrays["toy_T"]))
    for patch, overlap in (("patch", "none"), ("patch_overlap", "cut")):
        kind = "grid" if overlap == "none" else overlap
        pipe = PDDPMPipeline(
            ToyUNet().fill(arrays),
            scheduler,
            make_processor(int(arrays["H"])),
            timesteps=[int(arrays["t"])],
            patch_size=int(arrays[patch]),
            overlap=overlap,
        )
        pipe.set_progress_bar_config(disable=True)
        for batch_size in (1, 5, 64):
            results = pipe.compute_maps(
                slices,
                list(range(len(slices))),
                seed=0,
                batch_size=batch_size,
                noise=arrays[f"noise_{kind}"][None],
                **pipe.default_settings(),
            )
            assert_close(results.reconstruction, as_slices(arrays[f"reco_{kind}_volume"]), rtol=0, atol=1e-6)


@over("sadm/simplex*.npz")
def test_simplex_noise(path):
    arrays = load(path)
    exact = {"rtol": 0, "atol": 1e-12}
    tables = permutation_tables(arrays["seeds"])
    assert tables.equal(arrays["perm"].long()) and (tables % 24 * 3).equal(arrays["perm_grad_index3"].long())
    points = torch.stack([arrays["pts_x"], arrays["pts_y"]], 1)
    assert_close(opensimplex2(arrays["seeds"], points), arrays["noise2"], **exact)

    size, frequency = int(arrays["size"]), float(arrays["frequency"])
    noise = OctaveSimplexNoise(int(arrays["octaves"]), float(arrays["persistence"]), frequency, z=None)
    assert_close(noise(arrays["seeds"][1], None, size, size, torch.float64), arrays["rand2d"], **exact)
    [name] = [name for name in arrays if name.startswith("rand2d_")]
    octaves, persistence, wavelength = (part[1:] for part in name.split("_")[1:])
    other = OctaveSimplexNoise(int(octaves), float(f"{persistence[0]}.{persistence[1:]}"), float(wavelength), z=None)
    assert_close(other(arrays["seeds"][1], None, *arrays[name].shape, torch.float64), arrays[name], **exact)

    # Two seeds are drawn from numpy's global generator, and the second one is used, for all images.
    drawn = np.random.RandomState(int(arrays["np_seed"])).randint(-(10**10), 10**10, 2)
    assert drawn.tolist() == arrays["drawn_seeds"].tolist()
    field = noise(arrays["drawn_seeds"][1], None, size, size, torch.float64)
    assert field.half().equal(arrays["gen_noise"][0, 0])
    assert arrays["gen_noise_same_for_batch"]

    # Statistics over 60 maps of 96 x 96 pixels, whatever `size` is (README); within 4 standard errors of the recording's and of ours.
    fields = noise(torch.arange(300) * 7919, None, 96, 96)
    shares = (1 / 60 + 1 / len(fields)) ** 0.5
    deviations, means = fields.std((1, 2)).double(), fields.mean((1, 2)).double()
    assert_close(deviations.mean(), arrays["stat_mean_of_std"], rtol=0, atol=4 * shares * deviations.std().item())
    assert_close(means.std(), arrays["stat_std_of_means"], rtol=4 * shares / 2**0.5, atol=0)


@over("sadm/eval_sadm*.npz")
def test_similarity_of_a_volume(path):
    arrays, images = load(path), load(path.with_name(path.name.replace("sadm", "cddpm")))
    # (X, Y, Z) as recorded: the window is the same along all axes.
    similarity = ssim_map(images["val0_rec"].float(), images["val0_img"].float())
    assert_close(similarity[..., arrays["ssim_slices"]], arrays["ssim_val0_s3"], rtol=0, atol=1e-5)
    inner = similarity[4:-4, 4:-4, 4:-4].double().mean()
    assert_close(inner.item(), arrays["ssim_mean_val0"].item(), rtol=0, atol=1e-5)
