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

`brain_damage`: the state dict of its `UNet2DModel`, with the notebook's schedule, noise and preprocessing. `andi`:
the state dict of ANDi's `UNet` for FLAIR, T1, T1ce and T2, with the preprocessing of the recipe `brats21_andi`.
`anofpdm`: one of the networks of AnoFPDM, four modalities with the recipe `brats21_anofpdm`, one with `atlas_anofpdm`:
`v2` becomes an AnoFPDMPipeline, whose components a DDIBPipeline takes as well; `v1` with one output per modality an
AnoDDPMPipeline, with two and a classifier a ClassifierGuidedPipeline; `classifier` a folder that `--classifier` and
the training of the guided network take. `cimd`: CIMD's network for LIDC, with the preprocessing of the recipe
`cimd_lidc`; the weights of its four equal image channels are added up to those of one. `cddpm`: a cDDPM with its timm
ResNet, or a DDPM_2D without one, `pddpm`: a pDDPM, with the preprocessing of the recipe `sadm_t2` or `sadm_t1`.
`sadm`: the segmentation network (`SegUnet`) of a checkpoint, beside the cDDPM `--cddpm`, which was converted or
trained before. The values for inference are those of the configurations of the same names; nothing is calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..configs import parse_options


# What a user does after a stop.
GO_ON = "The same command begins anew."

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
    """Converts one checkpoint; returns the exit status."""
    usage = "convert.py METHOD [NETWORK] CHECKPOINT OUT"
    options = parse_options(ConvertOptions, argv, prog=usage, description=__doc__, positional="arguments")
    method, *names = options.arguments or [None]
    network = names.pop(0) if method == "anofpdm" and names else None
    if method not in METHODS or len(names) != 2 or (method == "anofpdm" and network not in ANOFPDM_NETWORKS):
        raise ValueError(
            f"METHOD ({', '.join(METHODS)}) CHECKPOINT OUT are needed, and for anofpdm NETWORK"
            f" ({', '.join(ANOFPDM_NETWORKS)}) before CHECKPOINT, got {options.arguments}."
        )
    if options.unet and method not in ("anofpdm", "cimd", "cddpm", "pddpm"):
        raise ValueError(
            f"`--unet` is for anofpdm, cimd, cddpm and pddpm; the network of {method} has one size, or its"
            " weights tell it."
        )
    if options.modality not in ("t1", "t2"):
        raise ValueError(f"`--modality` must be t1 or t2, got {options.modality!r}.")
    if options.classifier and network != "v1":
        raise ValueError("`--classifier` is for anofpdm v1.")
    if (options.cddpm is not None) != (method == "sadm"):
        raise ValueError("`--cddpm` is for sadm, which needs it.")
    checkpoint, out = names
    if Path(out).exists():
        raise FileExistsError(f"{out} exists already; choose another folder.")
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"There is no file {checkpoint}.")

    # Here, so that `--help` and wrong arguments need no torch.
    from . import andi, anofpdm, brain_damage, cddpm, cimd, sadm
    from .parts import read_weights, write_folder

    state = read_weights(checkpoint, options.key)
    try:
        if method == "brain_damage":
            result = brain_damage.convert(state)
        elif method == "andi":
            result = andi.convert(state)
        elif method == "anofpdm":
            result = anofpdm.convert(state, network, options.unet, options.classifier)
        elif method == "cimd":
            result = cimd.convert(state, options.unet)
        elif method == "sadm":
            result = sadm.convert(state, options.cddpm)
        else:
            result = cddpm.convert(state, method, options.unet, options.modality)
    except (RuntimeError, AttributeError, KeyError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint} does not fit the network of {method}: {reason[:500] + '...' * (len(reason) > 500)} If the"
            f" weights lie under a key of the checkpoint, name it with `--key`; keys there:"
            f" {', '.join(list(state)[:8])}, ..."
        ) from error
    print(f"{write_folder(*result, out)} written to {out}")
    return 0
