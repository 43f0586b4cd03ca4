"""Runs `python -m anodiff.convert`."""

import sys

from ..running import run_script
from . import GO_ON, main


sys.exit(run_script(main, GO_ON))
