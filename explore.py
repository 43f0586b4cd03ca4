"""Shows in a browser what noise does to a slice: Gaussian, simplex and pyramid noise, at any step of a schedule.

python explore.py                       # http://127.0.0.1:7860
python explore.py --port 8000

Needs the extra `app` (gradio). The page is served to this computer alone unless `--host` says otherwise; nothing is
sent anywhere else. Research use, not a medical device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = ""


@dataclass
class ExploreOptions:
    """Where the page is served."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for everybody in the network."""
    port: int = 7860
    """Port."""


def main(argv: list[str] | None = None) -> int:
    """Serves the noise explorer until it is stopped."""
    options = parse_options(ExploreOptions, argv, prog="explore.py", description=__doc__)

    from anodiff.apps.explorer_page import fill_explorer
    from anodiff.apps.pages import make_page, serve

    serve(make_page("anodiff: noise explorer", {"Noise explorer": fill_explorer}), options.host, options.port)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
