# Copyright 2026 The anodiff authors. Licensed under the Apache License, Version 2.0.
"""HuggingFace-style pipelines that find anomalies in medical images with diffusion models."""

import lazy_loader


__version__ = "0.1.0"

# Lazy, so that `--help` never waits for torch; `__init__.pyi` lists the public names. Touching any of these classes
# imports its module, and every module with a network or a scheduler, so every pipeline, imports `hub.registration`
# first; preparing data does without. The base names that it gives are looked up here by diffusers' loader.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
