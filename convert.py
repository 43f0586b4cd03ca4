"""Turns a checkpoint of an original program into a pipeline folder.

    python convert.py brain_damage model.pth out/
    python convert.py andi ema_ckpt.pt out/
    python convert.py anofpdm v2 ema_0.9999_210000.pt out/
    python convert.py anofpdm classifier model149999.pt classifier/
    python convert.py anofpdm v1 ema_0.9999_500000.pt out/ --classifier classifier/
    python convert.py cimd savedmodel053000.pt out/
    python convert.py cddpm last.ckpt out/ --key state_dict --modality t1
    python convert.py pddpm last.ckpt out/ --key state_dict
    python convert.py sadm last.ckpt out/ --key state_dict --cddpm cddpm/

`brain_damage`: the state dict of its `UNet2DModel`, with the notebook's schedule, noise and preprocessing. `andi`: the state dict of
ANDi's `UNet` for FLAIR, T1, T1ce and T2, with the preprocessing of the recipe `brats21_andi`. `anofpdm`: one of the networks of
AnoFPDM, four modalities with the recipe `brats21_anofpdm`, one with `atlas_anofpdm`: `v2` becomes an AnoFPDMPipeline, whose components
a DDIBPipeline takes as well; `v1` with one output per modality an AnoDDPMPipeline, with two and a classifier a
ClassifierGuidedPipeline; `classifier` a folder that `--classifier` and the training of the guided network take. `cimd`: CIMD's network
for LIDC, with the preprocessing of the recipe `cimd_lidc`; the weights of its four equal image channels are added up to those of one.
`cddpm`: a cDDPM with its timm ResNet, or a DDPM_2D without one, `pddpm`: a pDDPM, with the preprocessing of the recipe `sadm_t2` or
`sadm_t1`. `sadm`: the segmentation network (`SegUnet`) of a checkpoint, beside the cDDPM `--cddpm`, which was converted or trained before. The
values for inference are those of the configurations of the same names; nothing is calibrated.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anodiff.configs import parse_options


METHODS = ("brain_damage", "andi", "anofpdm", "cimd", "cddpm", "pddpm", "sadm")
ANOFPDM_NETWORKS = ("v2", "v1", "classifier")


@dataclass
class ConvertOptions:
    """METHOD [NETWORK] CHECKPOINT OUT."""

    arguments: list[str] = field(default_factory=list)
    key: str | None = None
    """Key of the weights in the checkpoint, where it holds more than them."""
    unet: dict[str, Any] = field(default_factory=dict)
    """Arguments of an anofpdm, cimd, cddpm or pddpm network that was trained with others than its authors', such as
    `--unet.layers_per_block 1`."""
    classifier: str | None = None
    """Folder or Hub id of a classifier, for an anofpdm v1 with a learned variance."""
    modality: str = "t2"
    """Contrast that a cddpm or pddpm was trained on, t1 or t2."""
    cddpm: str | None = None
    """Folder or Hub id of the cDDPM that a sadm was trained with."""


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit status."""
    options = parse_options(
        ConvertOptions,
        argv,
        prog="convert.py METHOD [NETWORK] CHECKPOINT OUT",
        description=__doc__,
        positional="arguments",
    )
    method, *names = options.arguments or [None]
    network = names.pop(0) if method == "anofpdm" and names else None
    if method not in METHODS or len(names) != 2 or (method == "anofpdm" and network not in ANOFPDM_NETWORKS):
        raise SystemExit(
            f"error: METHOD ({', '.join(METHODS)}) CHECKPOINT OUT are needed, and for anofpdm NETWORK"
            f" ({', '.join(ANOFPDM_NETWORKS)}) before CHECKPOINT, got {options.arguments}."
        )
    if options.unet and method not in ("anofpdm", "cimd", "cddpm", "pddpm"):
        raise SystemExit(
            f"error: `--unet` is for anofpdm, cimd, cddpm and pddpm; the network of {method} has one size, or tells it."
        )
    if options.modality not in ("t1", "t2"):
        raise SystemExit(f"error: `--modality` must be t1 or t2, got {options.modality!r}.")
    if options.classifier and network != "v1":
        raise SystemExit("error: `--classifier` is for anofpdm v1.")
    if (options.cddpm is not None) != (method == "sadm"):
        raise SystemExit("error: `--cddpm` is for sadm, which needs it.")
    checkpoint, out = names
    if Path(out).exists():
        raise SystemExit(f"error: {out} exists already; choose another folder.")

    import torch

    # Only tensors are read: a pickle from elsewhere could run code.
    if not Path(checkpoint).is_file():
        raise SystemExit(f"error: there is no file {checkpoint}.")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if options.key is not None and options.key not in state:
        raise SystemExit(
            f"error: {checkpoint} has no key {options.key!r}; it has {', '.join(map(str, list(state)[:8]))}."
        )
    state = state if options.key is None else state[options.key]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        if method == "anofpdm":
            pipeline, config = _anofpdm(network, state, options)
        elif method == "cimd":
            pipeline, config = _cimd(state, options)
        elif method in ("cddpm", "pddpm"):
            pipeline, config = _cddpm(method, state, options)
        elif method == "sadm":
            pipeline, config = _sadm(state, options)
        else:
            pipeline, config = _brain_damage() if method == "brain_damage" else _andi()
            if method == "andi":
                state = transpose_kernels(pipeline.unet.convert_original_state_dict(state))
            pipeline.unet.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise SystemExit(
            f"error: {checkpoint} does not fit the network of {method}: {error}\nIf the weights lie under a key of the"
            f" checkpoint, name it with `--key`; keys there: {', '.join(map(str, list(state)[:8]))}, ..."
        ) from error

    from anodiff.hub.model_card import make_card
    from anodiff.hub.publishing import complete_folder
    from anodiff.training.objective_guided import ClassifierObjective

    if isinstance(pipeline, ClassifierObjective):
        pipeline.export(pipeline.model, out)
        print(f"Classifier written to {out}")
        return 0
    pipeline.unet.eval()
    pipeline.save_pretrained(out)
    complete_folder(out, str(make_card(pipeline, config=config)))
    print(f"Pipeline folder written to {out}")
    return 0


def transpose_kernels(state: dict) -> dict:
    """
    Weights of a network that sees transposed images.

    The originals cut volumes as `array[:, :, k]`, so that H is the axis from right to left; our slices have it along W. Nothing
    knows which axis is which but the kernels, and the classifier's embedding of the positions (after one of the mean).
    """
    import torch

    transposed = {}
    for name, tensor in state.items():
        if name.endswith("positional_embedding"):
            side = math.isqrt(tensor.shape[1] - 1)
            grid = tensor[:, 1:].unflatten(1, (side, side)).mT.flatten(1)
            tensor = torch.cat([tensor[:, :1], grid], 1)
        transposed[name] = tensor.mT.contiguous() if tensor.ndim == 4 else tensor
    return transposed


def fold_image_channels(state: dict) -> dict:
    """Weights of CIMD's network for one image instead of four equal ones: the first convolution sees nothing but their sum."""
    import torch

    name = "input_blocks.0.0.weight"
    image, mask = state[name].split((4, 1), dim=1)
    return {**state, name: torch.cat([image.sum(1, keepdim=True), mask], dim=1)}


def convert_timm_resnet(state: dict) -> dict:
    """Weights of timm's (or torchvision's) ResNet under the names of transformers' `ResNetForImageClassification`."""
    converted = {}
    for name, tensor in state.items():
        for pattern, new in (
            (r"^conv1\.", "resnet.embedder.embedder.convolution."),
            (r"^bn1\.", "resnet.embedder.embedder.normalization."),
            (r"^fc\.", "classifier.1."),
            (r"\.conv(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.convolution."),
            (r"\.bn(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.normalization."),
            (r"\.downsample\.0\.", ".shortcut.convolution."),
            (r"\.downsample\.1\.", ".shortcut.normalization."),
            (r"^layer(\d)\.(\d+)\.", lambda match: f"resnet.encoder.stages.{int(match[1]) - 1}.layers.{match[2]}."),
        ):
            name = re.sub(pattern, new, name)
        converted[name] = tensor
    return converted


def _brain_damage():
    """Pipeline with untrained weights, and its configuration."""
    import yaml

    from anodiff import AnoDDPMPipeline, VolumeProcessor
    from anodiff.configs import packaged_config
    from anodiff.training.objective_noise import NoiseObjective
    from anodiff.training.options import TrainOptions

    config = yaml.safe_load(packaged_config("brain_damage.yaml").read_text())
    blocks = {name: config[name] for name in ("unet", "scheduler", "inference", "objective") if name in config}
    processor = VolumeProcessor.from_dict(config["processor"])
    objective = NoiseObjective.from_options(TrainOptions(**blocks), processor)
    return AnoDDPMPipeline(objective.model, objective.scheduler, processor, **objective.inference), config


def _andi():
    """Pipeline with untrained weights; its configuration is that of the classes."""
    from anodiff import ANDiPipeline, ANDiScheduler, ANDiUNet2DModel, VolumeProcessor
    from anodiff.data.prepare import read_recipe

    processor = VolumeProcessor.from_dict(read_recipe("brats21_andi")["processor"])
    return ANDiPipeline(ANDiUNet2DModel(), ANDiScheduler(), processor), None


def _anofpdm(network: str, state: dict, options: ConvertOptions):
    """Pipeline with the weights, and its configuration; of the classifier its objective, which writes what is no pipeline."""
    import yaml

    from anodiff import (
        AnoDDPMPipeline,
        AnoDDPMScheduler,
        AnoFPDMPipeline,
        AnoFPDMScheduler,
        AnoFPDMUNet2DModel,
        ClassifierGuidedPipeline,
        NoisyClassifierModel,
        UNet2DHeadsModel,
        VolumeProcessor,
    )
    from anodiff.configs import packaged_config
    from anodiff.data.prepare import read_recipe
    from anodiff.training.objective_guided import ClassifierObjective, load_classifier
    from anodiff.training.objective_noise import check_keys

    known = {"in_channels": ("input_blocks.0.0.weight", 1), "out_channels": ("out.2.weight", 0)}
    if network == "classifier":
        del known["out_channels"]
    missing = [name for name, _ in known.values() if name not in state]
    if missing:
        raise AttributeError(f"it has no {' and no '.join(missing)}.")
    sizes = {argument: state[name].shape[axis] for argument, (name, axis) in known.items()}
    channels = sizes["in_channels"]
    data = {4: "brats21", 1: "atlas"}.get(channels)
    if data is None:
        raise SystemExit(
            f"error: AnoFPDM's networks are for 4 modalities (BraTS21) or 1 (ATLAS), this one is for {channels}."
        )
    learned_sigma = network == "v1" and sizes["out_channels"] == 2 * channels
    if learned_sigma and options.classifier is None:
        raise SystemExit(
            "error: this v1 has two outputs per modality, a learned variance: name the classifier that guides it, converted or"
            " trained, with `--classifier`."
        )
    if options.classifier is not None and not learned_sigma:
        raise SystemExit(
            "error: this v1 has no learned variance, so that nothing guides it: leave `--classifier` out."
        )
    name = {"v2": "anofpdm", "classifier": "classifier"}.get(
        network, "classifier_guided" if learned_sigma else "unguided"
    )
    config = yaml.safe_load(packaged_config(f"{name}_{data}.yaml").read_text())
    processor = VolumeProcessor.from_dict(read_recipe(f"{data}_anofpdm")["processor"])
    inference = config.get("inference", {})
    if network == "v2":
        # The configuration is for new weights; the network of the original has its own class.
        check_keys("unet", options.unet, AnoFPDMUNet2DModel)
        model = AnoFPDMUNet2DModel(**{**sizes, "dropout": config["unet"]["dropout"], **options.unet})
        finished = AnoFPDMPipeline(model, AnoFPDMScheduler(**config["scheduler"]), processor, **inference)
    else:
        arguments = {**config["unet"], "sample_size": processor.config.size[0], **sizes, **options.unet}
        del arguments["_class_name"]
        check_keys("unet", options.unet, NoisyClassifierModel if network == "classifier" else UNet2DHeadsModel)
        if network == "classifier":
            model = NoisyClassifierModel(**arguments)
            finished = ClassifierObjective(model, AnoFPDMScheduler(**config["scheduler"]), processor)
        elif learned_sigma:
            scheduler, model = AnoFPDMScheduler(**config["scheduler"]), UNet2DHeadsModel(**arguments)
            classifier = load_classifier(options.classifier, scheduler, processor)
            finished = ClassifierGuidedPipeline(model, classifier, scheduler, processor, **inference)
        else:
            model = UNet2DHeadsModel(**arguments)
            finished = AnoDDPMPipeline(model, AnoDDPMScheduler(**config["scheduler"]), processor, **inference)
    model.load_state_dict(transpose_kernels(model.convert_original_state_dict(state)))
    used = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return finished, {**config, "unet": {"_class_name": type(model).__name__, **used}, "objective": {}}


def _cimd(state: dict, options: ConvertOptions):
    """Pipeline with the weights, and its configuration. Its slices are pictures, whose rows and columns the original exchanged with
    nothing: no kernel is transposed."""
    import yaml

    from anodiff import CIMDPipeline, CIMDScheduler, UNet2DHeadsModel, VolumeProcessor
    from anodiff.configs import packaged_config
    from anodiff.data.prepare import read_recipe
    from anodiff.training.objective_noise import check_keys

    config = yaml.safe_load(packaged_config("cimd_lidc.yaml").read_text())
    processor = VolumeProcessor.from_dict(read_recipe("cimd_lidc")["processor"])
    first = state.get("input_blocks.0.0.weight")
    if first is None or first.shape[1] != 5:
        channels = "none" if first is None else first.shape[1]
        raise AttributeError(
            f"the first convolution must have 5 channels, four equal images and the mask; there are {channels}."
        )
    check_keys("unet", options.unet, UNet2DHeadsModel)
    arguments = {"sample_size": processor.config.size[0], **config["unet"], **options.unet}
    del arguments["_class_name"]
    model = UNet2DHeadsModel(**{**arguments, "in_channels": 2, "out_channels": 2})
    model.load_state_dict(model.convert_original_state_dict(fold_image_channels(state)))
    pipeline = CIMDPipeline(model, CIMDScheduler(**config["scheduler"]), processor, **config["inference"])
    used = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return pipeline, {**config, "unet": {"_class_name": type(model).__name__, **used}, "objective": {}}


def _cddpm(method: str, state: dict, options: ConvertOptions):
    """Pipeline with the weights, and its configuration. Without an encoder a cddpm is a DDPM_2D."""
    import yaml
    from transformers import ResNetConfig, ResNetForImageClassification

    from anodiff import AnoDDPMScheduler, CDDPMPipeline, ConditionedUNet2DModel, PDDPMPipeline, VolumeProcessor
    from anodiff.configs import packaged_config
    from anodiff.data.prepare import read_recipe
    from anodiff.training.objective_noise import check_keys

    def part(first: str) -> dict:
        """The weights of the network that has this parameter, under its own names."""
        prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), None)
        if prefix is None:
            return {}
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    denoiser, resnet = part("input_blocks.0.0.weight"), part("layer1.0.conv1.weight")
    if not denoiser:
        raise AttributeError("it has no input_blocks.0.0.weight.")
    conditioned = "label_emb.0.weight" in denoiser
    if conditioned != bool(resnet) or (conditioned and method == "pddpm"):
        raise AttributeError(
            "a cddpm has an encoder and a condition (label_emb), or neither, a pddpm neither; there is"
            f" {'an' if resnet else 'no'} encoder and {'a' if conditioned else 'no'} condition."
        )
    name = {"pddpm": "pddpm", "cddpm": "cddpm" if conditioned else "ddpm_2d"}[method]
    config = yaml.safe_load(packaged_config(f"{name}.yaml").read_text())
    processor = VolumeProcessor.from_dict(read_recipe(f"sadm_{options.modality}")["processor"])

    check_keys("unet", options.unet, ConditionedUNet2DModel)
    arguments = {"sample_size": processor.config.size[0], **config["unet"], **options.unet}
    del arguments["_class_name"]
    arguments["condition_dim"] = denoiser["label_emb.0.weight"].shape[1] if conditioned else None
    model = ConditionedUNet2DModel(**arguments)
    # The program has more beside the network, such as tables of the schedule.
    original = {
        name
        for name in denoiser
        if re.match(r"(input_blocks|middle_block|output_blocks|out|time_embed|label_emb)\.", name)
    }
    denoiser = {name: denoiser[name] for name in original}
    model.load_state_dict(transpose_kernels(model.convert_original_state_dict(denoiser)))
    used = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config = {**config, "unet": {"_class_name": "ConditionedUNet2DModel", **used}, "objective": {}}
    parts = {"unet": model, "scheduler": AnoDDPMScheduler(**config["scheduler"]), "processor": processor}
    if method == "pddpm":
        return PDDPMPipeline(**parts, **config["inference"]), config
    encoder = None
    if conditioned:
        # The sizes of the encoder are those of its weights: bottlenecks of three convolutions, or basic blocks of two.
        stages = sorted({int(match[1]) for name in resnet if (match := re.match(r"layer(\d)\.", name))})
        blocks = [
            {int(name.split(".")[1]) for name in resnet if name.startswith(f"layer{stage}.")} for stage in stages
        ]
        resnet = {name: resnet[name] for name in resnet if re.match(r"(conv1|bn1|layer\d|fc)\.", name)}
        last = "conv3" if "layer1.0.conv3.weight" in resnet else "conv2"
        settings = ResNetConfig(
            layer_type="bottleneck" if last == "conv3" else "basic",
            num_channels=resnet["conv1.weight"].shape[1],
            embedding_size=len(resnet["conv1.weight"]),
            hidden_sizes=[len(resnet[f"layer{stage}.0.{last}.weight"]) for stage in stages],
            depths=[len(numbers) for numbers in blocks],
            num_labels=len(resnet["fc.weight"]),
        )
        encoder = ResNetForImageClassification(settings).eval()
        encoder.load_state_dict(transpose_kernels(convert_timm_resnet(resnet)))
    return CDDPMPipeline(**parts, encoder=encoder, **config["inference"]), config


def _sadm(state: dict, options: ConvertOptions):
    """Pipeline with the weights of the segmentation network, whose sizes they tell, and those of a cDDPM."""
    from anodiff import CDDPMPipeline, SADMPipeline, SiameseUNet2DModel

    first = "down_path.0.block.1.weight"
    prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), None)
    if prefix is None:
        raise AttributeError(f"it has no {first}.")
    # The frozen cDDPM of the checkpoint stays behind.
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    levels = {int(name.split(".")[1]) for name in state if name.startswith("down_path.")}
    widths = [len(state[f"down_path.{level}.block.1.weight"]) for level in sorted(levels)]
    model = SiameseUNet2DModel(state[first].shape[1], widths)
    model.load_state_dict(transpose_kernels(model.convert_original_state_dict(state)))
    part = CDDPMPipeline.from_pretrained(options.cddpm)
    return SADMPipeline(part.unet, model.eval(), part.scheduler, part.processor, part.encoder), None


if __name__ == "__main__":
    sys.exit(main())
