"""Trains one method.

python train.py                                              # AnoDDPM on the built-in phantom
accelerate launch train.py --config configs/anoddpm_nfbs.yaml --data prepared/nfbs
accelerate launch train.py --config my.yaml --train.resume latest
"""

from __future__ import annotations

import sys

from anodiff.checks import check_choice
from anodiff.configs import parse_options
from anodiff.running import run_script
from anodiff.training.options import TrainOptions


# What a user does after a stop.
GO_ON = "`--train.resume latest` goes on from the last checkpoint."


# Method -> module and class of its objective.
OBJECTIVES = {
    "anoddpm": ("anodiff.training.objective_noise", "NoiseObjective"),
    "andi": ("anodiff.training.objective_noise", "ANDiObjective"),
    "autoddpm": ("anodiff.training.objective_noise", "AutoDDPMObjective"),
    "anofpdm": ("anodiff.training.objective_guided", "GuidedObjective"),
    "ddib": ("anodiff.training.objective_guided", "DDIBObjective"),
    "classifier": ("anodiff.training.objective_guided", "ClassifierObjective"),
    "learned_sigma": ("anodiff.training.objective_guided", "LearnedSigmaObjective"),
    "cimd": ("anodiff.training.objective_cimd", "CIMDObjective"),
    "cddpm": ("anodiff.training.objective_cddpm", "CDDPMObjective"),
    "ddpm_2d": ("anodiff.training.objective_cddpm", "DDPM2DObjective"),
    "pddpm": ("anodiff.training.objective_cddpm", "PDDPMObjective"),
    "dae": ("anodiff.training.objective_dae", "DAEObjective"),
    "sadm": ("anodiff.training.objective_sadm", "SADMObjective"),
    "sadm_labelled": ("anodiff.training.objective_sadm", "LabelledSADMObjective"),
    "brain_extractor": ("anodiff.training.objective_extractor", "BrainExtractorObjective"),
    "spark": ("anodiff.training.objective_spark", "SparKObjective"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    options = parse_options(
        TrainOptions,
        argv,
        prog="train.py",
        description=__doc__,
        shorthands={"--data": "--data.path", "--push_to_hub": "--train.push_to_hub"},
        default_config="anoddpm_phantom.yaml",
    )
    check_choice("method", options.method, OBJECTIVES)

    import importlib

    from anodiff.training.loop import fit

    module, name = OBJECTIVES[options.method]
    fit(options, getattr(importlib.import_module(module), name))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
