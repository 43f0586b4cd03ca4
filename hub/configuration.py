"""Keeps configurations and records plain: numbers and arrays of numpy or torch become those of Python, which JSON
has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin


def plain(value):
    """Returns a value with Python's numbers and lists in place of numpy's and torch's, however deep they lie in lists,
    tuples and dicts; anything else stays as it is."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    return value


class PlainConfigMixin(ConfigMixin):
    """Registers what a constructor is given as plain values ([`plain`]), so that the configuration can be saved."""

    def register_to_config(self, **settings) -> None:
        """Registers as `ConfigMixin.register_to_config`."""
        super().register_to_config(**{name: plain(value) for name, value in settings.items()})
