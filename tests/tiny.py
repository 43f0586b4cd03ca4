"""Real, tiny components of every pipeline, and what tests feed them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DModel
from transformers import ResNetConfig, ResNetForImageClassification

import anodiff
from anodiff import (
    ANDiScheduler,
    AnoDDPMScheduler,
    AnoFPDMScheduler,
    AnomalyPipeline,
    BrainExtractor,
    CIMDScheduler,
    ConditionedUNet2DModel,
    DAEScheduler,
    DAEUNet2DModel,
    NoisyClassifierModel,
    SiameseUNet2DModel,
    VolumeProcessor,
)


SIZE = 16
NO_FILTER = {"median_size": 0, "min_component_size": 0}

# Few steps and no filter, so that every value of a map shows.
SETTINGS = {
    "ANDiPipeline": {"start": 75, "stop": 79, "median_size": 0},
    "AnoDDPMPipeline": {"noise_level": 4},
    "AnoFPDMPipeline": {"forward_steps": 6, **NO_FILTER},
    "AutoDDPMPipeline": {
        **{"noise_level": 4, "inpainting_level": 4, "resample": 2},
        **{"mask_distance": "residual", "masking_threshold": 0.8, "median_size": 0},
    },
    "CDDPMPipeline": {"timesteps": (20, 50, 80), "erosion": 0, **NO_FILTER},
    "CIMDPipeline": {"num_ensemble": 3, "num_inference_steps": 4},
    "ClassifierGuidedPipeline": {"noise_level": 5, "guidance_scale": 1.0, **NO_FILTER},
    "DAEPipeline": {"median_size": 0},
    "DDIBPipeline": {"forward_steps": 6, **NO_FILTER},
    "PDDPMPipeline": {"timesteps": (50,), "patch_size": 8, "erosion": 0, **NO_FILTER},
    "SADMPipeline": {"timesteps": (20, 50, 80), "median_size": 0},
}
VALUE_RANGES = {"CIMDPipeline": (0.0, 1.0), "DAEPipeline": (0.0, 1.0), "PDDPMPipeline": (0.0, 1.0)}


def make_unet(inputs: int = 1, outputs: int | None = None, **settings) -> UNet2DModel:
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=inputs,
        out_channels=outputs or inputs,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        **settings,
    ).eval()
    if unet.class_embedding is not None:
        # Classes that differ: new embeddings are small beside what a trained network has.
        torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    return unet


def make_conditioned_unet(channels: int = 1, condition_dim: int | None = 6) -> ConditionedUNet2DModel:
    unet = ConditionedUNet2DModel(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        attention_head_dim=4,
        norm_num_groups=4,
        attn_norm_num_groups=4,
        condition_dim=condition_dim,
    ).eval()
    for parameter in unet.parameters():  # zero-initialised branches would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


def make_encoder(channels: int = 1, outputs: int = 6) -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=channels, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=outputs
    )
    return ResNetForImageClassification(config).eval()


def make_classifier(channels: int = 1) -> NoisyClassifierModel:
    classifier = NoisyClassifierModel(
        SIZE,
        channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        attention_levels=(),
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    for parameter in classifier.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return classifier


def make_extractor(spacing: float = 4.0) -> BrainExtractor:
    """An extractor that takes the bright part of a volume for the brain: every layer hands its input on."""
    extractor = BrainExtractor(spacing, block_out_channels=(4,), norm_num_groups=1).eval()
    with torch.no_grad():
        for name, parameter in extractor.named_parameters():
            parameter.zero_()
            if parameter.ndim == 5:
                parameter[:, 0, parameter.shape[2] // 2, parameter.shape[3] // 2, parameter.shape[4] // 2] = 1.0
            elif name.startswith("down_path") and name.endswith("weight"):
                parameter.fill_(1.0)  # of a normalisation
        extractor.last.bias.fill_(-1.0)
    return extractor


def make_raw_scan(spacing: tuple[float, float, float] = (4.0, 4.0, 6.0), skull: bool = True):
    """A bright brain in a dimmer head, not in the middle of the scan: image, brain `(X, Y, Z)`, and RAS affine."""
    shape = tuple(int(216 / edge) for edge in spacing)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -100.0, -110.0, -90.0
    places = np.stack(np.meshgrid(*[np.arange(count) for count in shape], indexing="ij"), -1) @ affine[:3, :3]
    x, y, z = np.moveaxis(places + affine[:3, 3] - (5.0, 0.0, 20.0), -1, 0)
    brain = (x / 55) ** 2 + (y / 70) ** 2 + (z / 50) ** 2 < 1
    head = (x / 75) ** 2 + (y / 92) ** 2 + (z / 72) ** 2 < 1
    noise = np.random.default_rng(0).random(shape, dtype=np.float32)
    image = 1000 * brain + 300 * (head & ~brain) + 20 * noise if skull else brain * (1000 + 20 * noise)
    return image.astype(np.float32), brain, affine


def make_components(name: str, channels: int) -> dict:
    """Networks and scheduler of a pipeline class."""
    one_step = {"num_train_timesteps": 100, "beta_schedule": "cosine", "wavelength": 8.0, "octaves": 3, "z": None}
    if name == "ANDiPipeline":
        return {"unet": make_unet(channels), "scheduler": ANDiScheduler()}
    if name == "AnoDDPMPipeline":
        return {"unet": make_unet(channels), "scheduler": AnoDDPMScheduler()}
    if name == "AutoDDPMPipeline":
        scheduler = AnoDDPMScheduler(noise_type="gaussian", variance_type="fixed_small")
        return {"unet": make_unet(channels), "scheduler": scheduler}
    if name in ("AnoFPDMPipeline", "DDIBPipeline"):
        unet = make_unet(channels, num_class_embeds=3)
        torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
        return {"unet": unet, "scheduler": AnoFPDMScheduler(50)}
    if name == "ClassifierGuidedPipeline":
        unet = make_unet(channels, 2 * channels)
        torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
        return {"unet": unet, "classifier": make_classifier(channels), "scheduler": AnoFPDMScheduler(50)}
    if name == "CIMDPipeline":
        return {"unet": make_unet(channels + 1, 2), "scheduler": CIMDScheduler()}
    if name == "DAEPipeline":
        unet = DAEUNet2DModel(channels, channels, (4, 8)).eval()
        return {"unet": unet, "scheduler": DAEScheduler(noise_resolution=4)}
    scheduler = AnoDDPMScheduler(**one_step)
    if name == "PDDPMPipeline":
        return {"unet": make_conditioned_unet(channels, None), "scheduler": scheduler}
    components = {"unet": make_conditioned_unet(channels), "encoder": make_encoder(channels), "scheduler": scheduler}
    if name == "SADMPipeline":
        components["segmentation_network"] = SiameseUNet2DModel(channels, (4, 8)).eval()
    return components


def make_pipeline(
    name: str, modalities: tuple[str, ...] = ("image",), /, *, processor_settings: dict | None = None, **settings
):
    """
    A pipeline of the class `name` with weights that are the same at every call, and a silent progress bar.

    `modalities` and `processor_settings` are those of its processor, `settings` components and settings of its own, instead of those above.
    """
    torch.manual_seed(0)
    made = VolumeProcessor(
        **{
            "modalities": modalities,
            "size": (SIZE, SIZE),
            "value_range": VALUE_RANGES.get(name, (-1.0, 1.0)),
            **(processor_settings or {}),
        }
    )
    parts = {**make_components(name, made.channels), "processor": made}
    pipe: AnomalyPipeline = getattr(anodiff, name)(**{**parts, **SETTINGS[name], **settings})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_volume(shape: tuple[int, ...] = (18, 20, 5), seed: int = 0) -> np.ndarray:
    """A volume of random brightness whose first three columns are background."""
    volume = np.random.default_rng(seed).random(shape).astype(np.float32) + 0.1
    volume[:3] = 0
    return volume


def make_slices(count: int = 3, channels: int = 1, value_range: tuple[float, float] = (-1.0, 1.0)) -> torch.Tensor:
    """Processed slices `(N, C, H, W)` of random brightness."""
    low, high = value_range
    values = torch.rand(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return low + (high - low) * values


def assert_same_map(actual, expected, tolerance: float = 1e-5) -> None:
    """Maps that differ by less than `tolerance` of the largest value, and are not empty."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))
