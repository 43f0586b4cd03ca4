"""AnoFPDM, the three networks of its program."""

from __future__ import annotations

from typing import Any

import torch

from ..models.classifier_2d import NoisyClassifierModel
from ..models.unet_2d_anofpdm import AnoFPDMUNet2DModel
from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.base import AnomalyPipeline
from ..pipelines.pipeline_anoddpm import AnoDDPMPipeline
from ..pipelines.pipeline_anofpdm import AnoFPDMPipeline
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from ..schedulers.scheduling_anofpdm import AnoFPDMScheduler
from ..training.objective_guided import ClassifierObjective, load_classifier
from .parts import add_network, make_network, read_config, read_processor, transpose_kernels


# Recipe and configurations for a network of this many modalities.
DATA = {4: "brats21", 1: "atlas"}


def convert(
    state: dict[str, torch.Tensor], network: str, unet: dict[str, Any], classifier: str | None
) -> tuple[AnomalyPipeline | ClassifierObjective, dict]:
    """
    Returns the pipeline with the weights, and its configuration; of the classifier the objective, which writes what is
    no pipeline.

    Args:
        state (`dict[str, torch.Tensor]`): Weights of `unet_v2.py`, `unet_v1.py` or the classifier.
        network (`str`): Which of them, `"v2"`, `"v1"` or `"classifier"`.
        unet (`dict`): Arguments of the network that differ from its authors'.
        classifier (`str`, *optional*): Folder or Hub id of the classifier that guides a v1 with a learned variance.
    """
    known = {"in_channels": ("input_blocks.0.0.weight", 1), "out_channels": ("out.2.weight", 0)}
    if network == "classifier":
        del known["out_channels"]
    missing = [name for name, _ in known.values() if name not in state]
    if missing:
        raise RuntimeError(f"it has no {' and no '.join(missing)}.")
    sizes = {argument: state[name].shape[axis] for argument, (name, axis) in known.items()}
    channels = sizes["in_channels"]
    if channels not in DATA:
        raise ValueError(
            f"AnoFPDM's networks are for 4 modalities (BraTS21) or 1 (ATLAS), this one is for {channels}."
        )
    guided = network == "v1" and sizes["out_channels"] == 2 * channels
    if guided and classifier is None:
        raise ValueError(
            "This v1 has two outputs per modality, a learned variance: name the classifier that guides it,"
            " converted or trained, with `--classifier`."
        )
    if classifier is not None and not guided:
        raise ValueError("This v1 has no learned variance: nothing guides it, leave `--classifier` out.")
    name = {"v2": "anofpdm", "v1": "classifier_guided" if guided else "unguided", "classifier": "classifier"}[network]
    config, processor = read_config(f"{name}_{DATA[channels]}"), read_processor(f"{DATA[channels]}_anofpdm")
    inference = config.get("inference", {})
    scheduler_class = AnoDDPMScheduler if name == "unguided" else AnoFPDMScheduler
    scheduler = scheduler_class(**config["scheduler"])
    if network == "v2":
        # The configuration is for new weights; the network of the original has its own class and takes nothing else
        # from it.
        authors = {"dropout": config["unet"]["dropout"]}
        model = make_network(AnoFPDMUNet2DModel, unet, authors, processor, **sizes)
        converted = AnoFPDMPipeline(model, scheduler, processor, **inference)
    elif network == "classifier":
        model = make_network(NoisyClassifierModel, unet, config["unet"], processor, **sizes)
        converted = ClassifierObjective(model, scheduler, processor)
    else:
        model = make_network(UNet2DHeadsModel, unet, config["unet"], processor, **sizes)
        if guided:
            guide = load_classifier(classifier, scheduler, processor)
            converted = ClassifierGuidedPipeline(model, guide, scheduler, processor, **inference)
        else:
            converted = AnoDDPMPipeline(model, scheduler, processor, **inference)
    model.load_state_dict(transpose_kernels(model.convert_original_state_dict(state)))
    return converted, add_network(config, model)
