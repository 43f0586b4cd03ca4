"""Turns a checkpoint of an original program into a pipeline folder; `python convert.py --help` says how.

python convert.py brain_damage model.pth out/
"""

import sys

from anodiff.convert import main


if __name__ == "__main__":
    sys.exit(main())
