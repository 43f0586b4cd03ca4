"""Runs `python -m anodiff.convert`."""

import sys

from . import main


sys.exit(main())
