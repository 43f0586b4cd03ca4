"""The picture of each scan."""

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from anodiff import disperse
from anodiff.evaluation.overview import draw_members, draw_overview

from ..tiny import make_pipeline, make_volume


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    found, savefig = [], Figure.savefig

    def keep(figure, *arguments, **options):
        savefig(figure, *arguments, **options)
        found.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


@pytest.mark.parametrize("name", ["sub-01_FLAIR", "cost $x and $\\foo", "a" * 150])
def test_the_heading_says_the_name_of_the_scan(tmp_path, figures, name):
    pipe = make_pipeline("AnoDDPMPipeline", threshold=0.01)
    spread = disperse(pipe, nib.Nifti1Image(make_volume((16, 16, 1)), np.eye(4)), 2)
    draw_overview(spread.first, tmp_path / "overview.png", name)
    draw_members(spread, tmp_path / "dispersion.png", name)
    for figure, rest in zip(figures, ("highest scored slices; cyan: score > 0.01.", "2 members."), strict=True):
        heading, width = figure.get_suptitle(), figure.get_figwidth()
        text = heading.replace("\n", "" if " " not in name and len(name) > 100 else " ")
        assert text.startswith(f"{name}:") and rest.replace(" ", "") in text.replace(" ", "")
        # Letters of this size are about 1/16 inch wide: the heading is no wider than the picture.
        assert max(map(len, heading.splitlines())) <= 16 * width


@pytest.mark.parametrize(
    ("shape", "spacing", "plane"),
    [
        ((16, 17, 9), (1.0, 1.0, 6.0), "axial"),
        ((16, 17, 1), (1.0, 1.0, 6.0), "axial"),
        ((40, 8, 4), (1.0, 1.0, 1.0), "axial"),  # wide
        ((8, 12, 40), (1.0, 1.0, 4.0), "sagittal"),  # and tall slices
    ],
)
def test_all_texts_are_within_the_picture(tmp_path, figures, shape, spacing, plane):
    pipe = make_pipeline("AnoDDPMPipeline", threshold=0.01, processor_settings={"plane": plane})
    scan = nib.Nifti1Image(make_volume(shape), np.diag([*spacing, 1.0]))
    draw_overview(pipe(scan), tmp_path / "overview.png", "scan", plane=plane)
    [figure] = figures
    figure.draw_without_rendering()  # at its own resolution, not that of the file
    width, height = figure.bbox.size
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    shown = {text.get_text() for text in texts}
    assert {"image", "pseudo-healthy", "anomaly map", "score"} <= shown
    titles = [text.get_window_extent() for text in texts if text.get_text().startswith("slice ")]
    titles.sort(key=lambda box: box.x0)
    assert len(titles) == min(5, len(pipe(scan).pred_score))

    assert all(one.x1 < other.x0 for one, other in zip(titles, titles[1:], strict=False))
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
