"""The training objectives of AnoFPDM and its baselines, and their configurations."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel

from anodiff import (
    AnoDDPMScheduler,
    AnoFPDMScheduler,
    AnoFPDMUNet2DModel,
    AnomalyPipeline,
    NoisyClassifierModel,
    UNet2DHeadsModel,
    VolumeProcessor,
)
from anodiff.data.prepare import read_recipe
from anodiff.schedulers.draws import make_keys
from anodiff.training.objective_guided import (
    ClassifierObjective,
    DDIBObjective,
    GuidedObjective,
    LearnedSigmaObjective,
    load_classifier,
)
from anodiff.training.objective_noise import NoiseObjective
from anodiff.training.options import TrainOptions


CONFIGS = Path(__file__).parents[2] / "configs"
UNET = {
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
ORIGINAL = {
    "_class_name": "AnoFPDMUNet2DModel",
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "attention_levels": [1],
    "norm_num_groups": 4,
}
CLASSIFIER = {
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "attention_levels": [1],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
SHORT = {"forward_steps": 3, "min_component_size": 0}


def processor(**settings) -> VolumeProcessor:
    return VolumeProcessor(modalities=("flair", "t1"), size=(8, 8), **settings)


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 2, 8, 8, generator=generator) * 2 - 1
    return {"image": images, "label": torch.arange(count) % 2}


def keys(positions, seed: int = 0) -> torch.Tensor:
    return make_keys(seed, positions)


def classifier_folder(tmp_path, **scheduler) -> Path:
    torch.manual_seed(0)
    options = TrainOptions(unet=CLASSIFIER, scheduler=scheduler)
    built = ClassifierObjective.from_options(options, processor())
    built.export(built.model, tmp_path / "classifier_run")
    return tmp_path / "classifier_run"


@pytest.fixture(params=["new", "original", "ddib", "classifier", "learned_sigma"])
def objective(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "classifier":
        built = ClassifierObjective.from_options(TrainOptions(unet=CLASSIFIER), processor())
    elif request.param == "learned_sigma":
        path = str(classifier_folder(tmp_path))
        options = TrainOptions(unet=UNET, inference={"noise_level": 3}, objective={"classifier_path": path})
        built = LearnedSigmaObjective.from_options(options, processor())
    else:
        method = DDIBObjective if request.param == "ddib" else GuidedObjective
        options = TrainOptions(unet=ORIGINAL if request.param == "original" else UNET, inference=SHORT)
        built = method.from_options(options, processor())
    for parameter in built.model.parameters():  # branches that begin with zero would hide everything behind them
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return built


def test_loss_of_a_sample_does_not_depend_on_the_batch(objective):
    data = batch()
    model = objective.model.eval()
    with torch.no_grad():
        together = objective.loss(model, data, keys(range(6)))
        alone = [
            objective.loss(model, {key: value[i : i + 1] for key, value in data.items()}, keys([i])) for i in range(6)
        ]
        other_seed = objective.loss(model, data, keys(range(6), seed=1))
    assert together.shape == (6,)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (together - other_seed).abs().min() > 1e-7


def test_a_few_steps_lower_the_loss(objective):
    data = batch(8)
    data["image"] = data["image"] * 0.1 + data["label"][:, None, None, None] * 0.8 - 0.4
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = objective.loss(objective.model, data, keys(range(8))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_preview_and_export(objective, tmp_path):
    data = batch(2)
    model = objective.model.eval()
    with torch.no_grad():
        rows = objective.preview(model, data, keys(range(2)))
    assert all(row.shape == data["image"].shape and torch.isfinite(row).all() for row in rows.values())
    assert not any(row.requires_grad for row in rows.values())
    if isinstance(objective, GuidedObjective):
        assert [title for title in rows if "w = " in title] == [
            f"as healthy, w = {strength}" for strength in ("0", "1", "1.8", "2", "3")
        ]
        assert (rows["as healthy, w = 3"] - rows["as healthy, w = 0"]).abs().max() > 1e-4
    folder = tmp_path / "pipeline"
    exported = objective.export(model, folder)
    if isinstance(objective, ClassifierObjective):
        assert exported is None and not (folder / "model_index.json").exists()
        loaded = NoisyClassifierModel.from_pretrained(folder, subfolder="classifier")
        torch.testing.assert_close(loaded(data["image"], 3).logits, model(data["image"], 3).logits)
        return
    loaded = AnomalyPipeline.from_pretrained(folder)
    assert type(loaded) is type(exported) is type(objective.export(model, tmp_path / "again"))
    for pipe in (exported, loaded):
        pipe.set_progress_bar_config(disable=True)
    expected = exported(data["image"]).anomaly_map
    torch.testing.assert_close(loaded(data["image"]).anomaly_map, expected)
    assert torch.as_tensor(expected).max() > 0


def test_labels_are_dropped_sample_by_sample():
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, sample, timesteps, class_labels):
            seen.append((class_labels, timesteps))
            return type("Output", (), {"sample": torch.zeros_like(sample)})

    data = batch(400)
    built = GuidedObjective(UNet2DModel(8, 2, 2, **UNET, num_class_embeds=3), AnoFPDMScheduler(), processor())
    none = GuidedObjective(built.model, built.scheduler, processor(), label_dropout=0.0)
    for chosen in (built, none):
        chosen.loss(Recorder(), data, keys(range(400)))
    (dropped, timesteps), (kept, same_timesteps) = seen
    assert torch.equal(kept, data["label"]) and torch.equal(timesteps, same_timesteps)
    share = (dropped == 2).float()
    assert abs(share.mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 400)
    assert torch.equal(dropped[share == 0], data["label"][share == 0])
    assert {0, 1} == set(data["label"][share == 1].tolist())  # of both classes
    assert timesteps.min() < 50 and timesteps.max() > 949


def test_unknown_labels_are_refused():
    data = batch(3)
    data["label"][1] = -1
    guided = GuidedObjective.from_options(TrainOptions(unet=UNET), processor())
    classifier = ClassifierObjective.from_options(TrainOptions(unet=CLASSIFIER), processor())
    for built in (guided, classifier):
        with pytest.raises(ValueError, match=r"`label` must be 0 \(healthy\) or 1 .* got \[-1, 0\]; -1 is unknown"):
            built.loss(built.model, data, keys(range(3)))


def test_from_options():
    built = GuidedObjective.from_options(TrainOptions(unet=UNET, inference=SHORT), processor())
    assert built.model.config.num_class_embeds == 3 and built.model.config.in_channels == 2
    assert built.label_dropout == 0.1 and built.columns == ("image", "label")
    built = GuidedObjective.from_options(
        TrainOptions(unet=ORIGINAL, objective={"label_dropout": 0.2}, scheduler={"num_train_timesteps": 600}),
        processor(),
    )
    assert type(built.model) is AnoFPDMUNet2DModel and built.model.config.sample_size == 8
    assert built.label_dropout == 0.2 and len(built.scheduler) == 600
    for wrong, message in (
        ({"unet": {"out_channels": 4}}, "`unet.out_channels` must be 2, the number of modalities, got 4"),
        ({"unet": {"num_class_embeds": 2}}, "`unet.num_class_embeds` must be 3, healthy, unhealthy, none, got 2"),
        ({"unet": {**ORIGINAL, "num_classes": 3}}, "`unet.num_classes` must be 2, healthy and unhealthy, got 3"),
        ({"objective": {"label_dropout": 2}}, "`label_dropout` must be a finite number .*, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidedObjective.from_options(TrainOptions(**{"unet": UNET, **wrong}), processor())
    options = TrainOptions(unet={**CLASSIFIER, "num_classes": 3})
    with pytest.raises(ValueError, match="`unet.num_classes` must be 2, healthy and unhealthy, got 3"):
        ClassifierObjective.from_options(options, processor())


def test_a_classifier_of_other_slices_or_noise_is_refused(tmp_path):
    folder = classifier_folder(tmp_path, num_train_timesteps=500)
    with pytest.raises(ValueError, match="trained with other noise: 500 betas"):
        load_classifier(folder, AnoFPDMScheduler(), processor())
    scheduler = AnoFPDMScheduler(num_train_timesteps=500)
    with pytest.raises(ValueError, match="the classifier .* was trained with: `intensity`"):
        load_classifier(folder, scheduler, processor(intensity="slice_minmax"))
    assert not load_classifier(folder, scheduler, processor()).training
    with pytest.raises(OSError):
        load_classifier(tmp_path / "nothing", scheduler, processor())


PIPELINES = {
    "anofpdm": (GuidedObjective, 96.32e6),
    "ddib": (DDIBObjective, 96.32e6),
    "classifier": (ClassifierObjective, 42.06e6),
    "learned_sigma": (LearnedSigmaObjective, 96.32e6),
    "anoddpm": (NoiseObjective, 96.32e6),
}


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for name in ("anofpdm", "ddib", "classifier", "unguided")
        for data in ("brats21", "atlas")
        for path in CONFIGS.glob(f"{name}*_{data}.yaml")
    ),
    ids=lambda path: path.stem,
)
def test_configurations(path, tmp_path):
    config = yaml.safe_load(path.read_text())
    given = VolumeProcessor.from_dict(read_recipe(f"{path.stem.split('_')[-1]}_anofpdm")["processor"])
    modalities = given.config.modalities
    method, parameters = PIPELINES[config["method"]]
    blocks = {name: config[name] for name in ("unet", "scheduler", "inference", "objective") if name in config}
    if "classifier_path" in blocks.get("objective", {}):
        small = ClassifierObjective.from_options(
            TrainOptions(unet={**CLASSIFIER, "num_classes": 2}, scheduler=config["scheduler"]), given
        )
        small.export(small.model, tmp_path)
        blocks["objective"] = {"classifier_path": str(tmp_path)}
    with torch.device("meta"):
        names = {
            "UNet2DModel": UNet2DModel,
            "UNet2DHeadsModel": UNet2DHeadsModel,
            "NoisyClassifierModel": NoisyClassifierModel,
        }
        unet = {**config["unet"], "in_channels": len(modalities)}
        network = names[unet.pop("_class_name", "UNet2DModel")]
        if "num_attention_heads" in unet or network is UNet2DModel:
            unet["out_channels"] = len(modalities)
        count = sum(parameter.numel() for parameter in network(sample_size=128, **unet).parameters())
    assert count == pytest.approx(parameters, rel=1e-3)
    narrow = {"block_out_channels": [32] * 5, "norm_num_groups": 8, "layers_per_block": 1}
    narrow |= {"attention_head_dim": 8} if "attention_head_dim" in unet else {}
    narrow |= {"attn_norm_num_groups": 8} if "attn_norm_num_groups" in unet else {}
    blocks["unet"] = {**config["unet"], **narrow}
    built = method.from_options(TrainOptions(**blocks), given)
    for key, value in config.get("inference", {}).items():
        assert list(built.inference[key]) == value if isinstance(value, list) else built.inference[key] == value
    scheduler = AnoDDPMScheduler if config["method"] == "anoddpm" else AnoFPDMScheduler
    assert type(built.scheduler) is scheduler
    # The middle attention has its norm.
    if network is not NoisyClassifierModel:
        assert built.model.mid_block.attentions[0].group_norm is not None
