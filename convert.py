"""Turns a checkpoint of an original program into a pipeline folder; `python convert.py --help` says how.

python convert.py brain_damage model.pth out/
"""

import sys

from anodiff.convert import GO_ON, main
from anodiff.running import run_script


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
