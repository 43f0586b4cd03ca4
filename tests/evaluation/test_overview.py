"""The picture of each scan."""

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure

from anodiff import disperse
from anodiff.evaluation.overview import draw_members, draw_overview

from ..tiny import make_pipeline, make_volume


@pytest.fixture
def headings(monkeypatch):
    """What stands above each picture that is drawn."""
    found, savefig = [], Figure.savefig

    def keep(figure, *arguments, **options):
        savefig(figure, *arguments, **options)
        found.append((figure.get_suptitle(), figure.get_figwidth()))

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


@pytest.mark.parametrize("name", ["sub-01_FLAIR", "cost $x and $\\foo", "a" * 150])
def test_the_heading_says_the_name_of_the_scan(tmp_path, headings, name):
    pipe = make_pipeline("AnoDDPMPipeline", threshold=0.01)
    spread = disperse(pipe, nib.Nifti1Image(make_volume((16, 16, 1)), np.eye(4)), 2)
    draw_overview(spread.first, tmp_path / "overview.png", name)
    draw_members(spread, tmp_path / "dispersion.png", name)
    for (heading, width), rest in zip(
        headings, ("highest scored slices; cyan: score > 0.01.", "2 members."), strict=True
    ):
        text = heading.replace("\n", "" if " " not in name and len(name) > 100 else " ")
        assert text.startswith(f"{name}:") and rest.replace(" ", "") in text.replace(" ", "")
        # Letters of this size are about 1/16 inch wide: the heading is no wider than the picture.
        assert max(map(len, heading.splitlines())) <= 16 * width
