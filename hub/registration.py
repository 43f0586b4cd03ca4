"""Makes diffusers load our components by the stable pair `["anodiff", "ClassName"]` of `model_index.json`.

diffusers accepts a component of a third-party library from the Hub only if the library stands in its table
`LOADABLE_CLASSES`, and recognises the component by `issubclass` against the base names that it finds in the library's
own name space (`anodiff.ModelMixin` and so on). Both tables are private: `setup.cfg` pins the minor version of
diffusers and the round-trip tests guard the mechanism. Every module that defines a network or a scheduler imports this
one first. `VolumeProcessor`, which data are prepared with, does not: no checkpoint has it without a scheduler.
"""

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines import pipeline_loading_utils
from diffusers.schedulers.scheduling_utils import SchedulerMixin


__all__ = ["ModelMixin", "SchedulerMixin"]

_METHODS = ["save_pretrained", "from_pretrained"]
_CLASSES = {name: _METHODS for name in ("ModelMixin", "SchedulerMixin", "VolumeProcessor")}

pipeline_loading_utils.LOADABLE_CLASSES["anodiff"] = _CLASSES
# diffusers fills this second table once, at its own import; a base name that is missing here does not load.
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(_CLASSES)
