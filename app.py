"""Finds anomalies in scans that are uploaded to a page, and shows them there.

python app.py                                     # http://127.0.0.1:7860, the checkpoints of this package
python app.py --model outputs/train/pipeline      # and another one: folder or Hub id

Needs the extra `app` (gradio). The page is served to this computer alone unless `--host` says otherwise. Scans are sent
nowhere else, and are deleted when the page is closed. Research use, not a medical device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = ""


@dataclass
class AppOptions:
    """Which model, and where the page is served."""

    model: str = ""
    """Pipeline folder or Hub id that can be chosen beside the checkpoints that come with the package."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for everybody in the network."""
    port: int = 7860
    """Port."""


def main(argv: list[str] | None = None) -> int:
    """Serves the page until it is stopped."""
    options = parse_options(AppOptions, argv, prog="app.py", description=__doc__)

    from anodiff.apps.maps import load_pipeline
    from anodiff.apps.maps_page import fill_maps
    from anodiff.apps.pages import make_page, serve

    if options.model:
        load_pipeline(options.model)  # before anybody waits for it
    fill = partial(fill_maps, models=[options.model] if options.model else [])
    serve(make_page("anodiff: anomaly maps", {"Anomaly maps": fill}), options.host, options.port)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
