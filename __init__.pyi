# Copyright 2026 The anodiff authors. Licensed under the Apache License, Version 2.0.
"""The public names: `__init__.py` imports each when it is first used, and type checkers see what it is."""

from .hub.registration import ModelMixin as ModelMixin
from .hub.registration import SchedulerMixin as SchedulerMixin
from .models.brain_extractor import BrainExtractor as BrainExtractor
from .models.classifier_2d import NoisyClassifierModel as NoisyClassifierModel
from .models.healthy_maps import HealthyMapsModel as HealthyMapsModel
from .models.siamese_unet import SiameseUNet2DModel as SiameseUNet2DModel
from .models.spark import SparKModel as SparKModel
from .models.unet_2d_andi import ANDiUNet2DModel as ANDiUNet2DModel
from .models.unet_2d_anofpdm import AnoFPDMUNet2DModel as AnoFPDMUNet2DModel
from .models.unet_2d_conditioned import ConditionedUNet2DModel as ConditionedUNet2DModel
from .models.unet_2d_dae import DAEUNet2DModel as DAEUNet2DModel
from .models.unet_2d_heads import UNet2DHeadsModel as UNet2DHeadsModel
from .models.unet_2d_patches import UNet2DPatchesModel as UNet2DPatchesModel
from .pipelines.base import AnomalyPipeline as AnomalyPipeline
from .pipelines.dispersion import disperse as disperse
from .pipelines.output import AnomalyOutput as AnomalyOutput
from .pipelines.output import CIMDOutput as CIMDOutput
from .pipelines.output import DispersionOutput as DispersionOutput
from .pipelines.pipeline_andi import ANDiPipeline as ANDiPipeline
from .pipelines.pipeline_anoddpm import AnoDDPMPipeline as AnoDDPMPipeline
from .pipelines.pipeline_anofpdm import AnoFPDMPipeline as AnoFPDMPipeline
from .pipelines.pipeline_autoddpm import AutoDDPMPipeline as AutoDDPMPipeline
from .pipelines.pipeline_cddpm import CDDPMPipeline as CDDPMPipeline
from .pipelines.pipeline_cimd import CIMDPipeline as CIMDPipeline
from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline as ClassifierGuidedPipeline
from .pipelines.pipeline_dae import DAEPipeline as DAEPipeline
from .pipelines.pipeline_ddib import DDIBPipeline as DDIBPipeline
from .pipelines.pipeline_pddpm import PDDPMPipeline as PDDPMPipeline
from .pipelines.pipeline_sadm import SADMPipeline as SADMPipeline
from .schedulers.scheduling_andi import ANDiScheduler as ANDiScheduler
from .schedulers.scheduling_anoddpm import AnoDDPMScheduler as AnoDDPMScheduler
from .schedulers.scheduling_anofpdm import AnoFPDMScheduler as AnoFPDMScheduler
from .schedulers.scheduling_cimd import CIMDScheduler as CIMDScheduler
from .schedulers.scheduling_dae import DAEScheduler as DAEScheduler
from .volumes.processor import VolumeProcessor as VolumeProcessor

__version__: str
