"""What the noise explorer computes."""

import base64
import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from anodiff.apps import explorer
from anodiff.apps.charts import Axis, draw_lines
from anodiff.apps.explorer import PRESETS, NoiseSettings
from anodiff.configs import parse_options
from anodiff.training.options import TrainOptions

from ..tiny import make_pipeline, make_slices


IMAGE = np.linspace(-1, 1, 24 * 32, dtype=np.float32).reshape(24, 32)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("AnoDDPM", {"noise_type": "simplex", "octaves": 6, "persistence": 0.8, "wavelength": 64.0, "timestep": 249}),
        ("brain_damage", {"wavelength": 32.0, "normalize": "per_image", "beta_schedule": "cosine_clipped"}),
        ("ANDi", {"noise_type": "pyramid", "discount": 0.8, "normalize": "per_batch", "beta_schedule": "linear"}),
        ("AutoDDPM", {"noise_type": "gaussian", "num_train_timesteps": 1000}),
        ("cDDPM", {"noise_type": "simplex", "z": None, "beta_schedule": "cosine"}),
    ],
)
def test_presets_have_the_numbers_of_the_methods(preset, wanted):
    settings = explorer.read_preset(preset)
    assert {name: getattr(settings, name) for name in wanted} == wanted


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_copied_trains_with_the_noise_that_is_seen(preset, tmp_path):
    settings = replace(explorer.read_preset(preset), timestep=140)
    seen = explorer.noise_slice(IMAGE, settings, seed=3)
    (tmp_path / "seen.yaml").write_text(explorer.write_settings(settings))
    options = parse_options(TrainOptions, ["--config", str(tmp_path / "seen.yaml")], prog="train.py", description="")
    assert options.method == ("andi" if settings.noise_type == "pyramid" else "anoddpm")
    scheduler = type(seen.scheduler)(**options.scheduler)
    assert scheduler.config == seen.scheduler.config
    if options.method == "anoddpm":
        assert options.inference == {"noise_level": 141}


def test_a_noised_slice_is_what_the_schedule_says_and_the_same_again():
    settings = NoiseSettings(timestep=100, wavelength=16.0)
    made = explorer.noise_slice(IMAGE, settings, seed=1)
    abar = float(made.scheduler.alphas_cumprod[100])
    np.testing.assert_allclose([made.signal**2, made.sigma**2], [abar, 1 - abar], rtol=1e-5)
    np.testing.assert_allclose(made.noised, made.signal * IMAGE + made.sigma * made.noise, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(made.noise, explorer.noise_slice(IMAGE, settings, seed=1).noise)
    assert np.abs(made.noise - explorer.noise_slice(IMAGE, settings, seed=2).noise).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": 1000}, "`timestep` must be"),
        ({"noise_type": "pink"}, "`noise_type` must be one of"),
        ({"z": explorer.read_depth("sideways")}, "`z` must be"),
        ({"num_train_timesteps": 20, "timestep": 0}, "must be above 20"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        explorer.noise_slice(IMAGE, replace(NoiseSettings(), **changes), seed=0)


def test_the_third_coordinate_as_it_is_written():
    assert [explorer.read_depth(text) for text in ("27", " none ", "", "timestep")] == [27.0, None, None, "timestep"]


@pytest.mark.parametrize("context", [0, 1])
def test_a_reconstruction_is_that_of_the_pipeline(context):
    pipe = make_pipeline("AnoDDPMPipeline", processor_settings={"context": context})
    slices = make_slices(1)
    made = explorer.reconstruct(pipe, slices, 30, seed=5)
    result = pipe(slices, mode="one_shot", noise_level=31, num_draws=1, generator=5)
    np.testing.assert_allclose(made.estimate, result.reconstruction[0, 0], rtol=0, atol=1e-5)
    assert np.abs(made.noised - made.slice).max() > 0.01
    with pytest.raises(ValueError, match="`timestep` must be"):
        explorer.reconstruct(pipe, slices, 1000, seed=5)


def test_white_noise_is_flat_and_a_wave_stands_at_its_wavelength():
    white = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).numpy() * 2
    frequencies, power = explorer.radial_spectrum(white)
    assert frequencies[0] == 1 / 128 and frequencies[-1] < 0.5
    # About 25 to 400 values in a ring: 4.0 to within four standard errors of the mean of the rings 4 to 63.
    assert abs(power[3:].mean() - 4.0) < 0.2
    wave = np.cos(2 * np.pi * np.arange(128) / 8)[None].repeat(128, 0)
    frequencies, power = explorer.radial_spectrum(wave)
    assert frequencies[power.argmax()] == 1 / 8 and power[:14].max() < 1e-12 * power.max()


def pixels(address: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_pictures():
    assert pixels(explorer.draw_image(np.array([[-2.0, -1.0, 0.0, 1.0]]))).tolist() == [[0, 0, 128, 255]]
    left, middle, right, beyond = pixels(explorer.draw_difference(np.array([[-0.5, 0.0, 0.5, 9.0]]), 0.5))[0].tolist()
    assert middle == [255, 255, 255] and left[2] > left[0] and right[0] > right[2] and beyond == right


def test_lines_lie_where_their_values_say():
    x = Axis("a < b", (1, 100), [(10, "10")], logarithmic=True)
    svg = ElementTree.fromstring(draw_lines({"one": ([1, 10, 1000], [0, 0.5, 2])}, x, Axis("y", (0, 1), []), mark=1))
    (line,) = svg.iter("polyline")
    assert line.get("points") == "56.0,196.0 194.0,112.0 332.0,28.0"
    assert "a < b" in [text.text for text in svg.iter("text")]
    for draw in (explorer.draw_spectrum, explorer.draw_histogram):
        chart = ElementTree.fromstring(draw({"slice": IMAGE, "noise": np.zeros_like(IMAGE)}))
        assert len(list(chart.iter("polyline"))) == 2 and "nan" not in ElementTree.tostring(chart, "unicode")
