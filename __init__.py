# Copyright 2026 The anodiff authors. Licensed under the Apache License, Version 2.0.
"""HuggingFace-style pipelines that find anomalies in medical images with diffusion models."""

import lazy_loader


__version__ = "0.1.0"

# Lazy, so that `--help` never waits for torch. Touching any of these classes imports its module, and every module with
# a class that checkpoints name imports `hub.registration` first. The base names that `hub.registration` gives are
# looked up here by diffusers' loader.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "hub.registration": ["ModelMixin", "SchedulerMixin"],
        "models.brain_extractor": ["BrainExtractor"],
        "models.classifier_2d": ["NoisyClassifierModel"],
        "models.siamese_unet": ["SiameseUNet2DModel"],
        "models.spark": ["SparKModel"],
        "models.unet_2d_andi": ["ANDiUNet2DModel"],
        "models.unet_2d_anofpdm": ["AnoFPDMUNet2DModel"],
        "models.unet_2d_conditioned": ["ConditionedUNet2DModel"],
        "models.unet_2d_dae": ["DAEUNet2DModel"],
        "models.unet_2d_heads": ["UNet2DHeadsModel"],
        "pipelines.base": ["AnomalyPipeline"],
        "pipelines.dispersion": ["disperse"],
        "pipelines.output": ["AnomalyOutput", "CIMDOutput", "DispersionOutput"],
        "pipelines.pipeline_andi": ["ANDiPipeline"],
        "pipelines.pipeline_anoddpm": ["AnoDDPMPipeline"],
        "pipelines.pipeline_anofpdm": ["AnoFPDMPipeline"],
        "pipelines.pipeline_autoddpm": ["AutoDDPMPipeline"],
        "pipelines.pipeline_cddpm": ["CDDPMPipeline"],
        "pipelines.pipeline_cimd": ["CIMDPipeline"],
        "pipelines.pipeline_classifier_guided": ["ClassifierGuidedPipeline"],
        "pipelines.pipeline_dae": ["DAEPipeline"],
        "pipelines.pipeline_ddib": ["DDIBPipeline"],
        "pipelines.pipeline_pddpm": ["PDDPMPipeline"],
        "pipelines.pipeline_sadm": ["SADMPipeline"],
        "schedulers.scheduling_andi": ["ANDiScheduler"],
        "schedulers.scheduling_anoddpm": ["AnoDDPMScheduler"],
        "schedulers.scheduling_anofpdm": ["AnoFPDMScheduler"],
        "schedulers.scheduling_cimd": ["CIMDScheduler"],
        "schedulers.scheduling_dae": ["DAEScheduler"],
        "volumes.processor": ["VolumeProcessor"],
    },
)
