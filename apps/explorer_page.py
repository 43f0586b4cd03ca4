"""The page of the noise explorer: controls, and what [`~apps.explorer`] computes for them."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .. import AnomalyPipeline
from ..configs import read_yaml
from ..data.phantoms.heads import CONTRASTS, LESIONS
from ..hub import shipped
from ..volumes.processor import VolumeProcessor
from . import explorer
from .explorer import PRESETS, NoiseSettings
from .heads import generate_head
from .pages import Sessions, gr, write_charts, write_note, write_pictures


GENERATED, OWN = "a generated head", "my own picture or scan"
NO_CHECKPOINT, NO_LESION = "none", "none"
SIZES = (64, 96, 128, 160, 192, 256)
SCHEDULES = {
    "gaussian": ["linear", "cosine", "cosine_clipped"],
    "simplex": ["linear", "cosine", "cosine_clipped"],
    "pyramid": ["linear", "shifted_cosine"],
}
NORMALIZATIONS = {"gaussian": ["none"], "simplex": ["none", "per_image", "analytic"], "pyramid": ["per_batch"]}
# Controls of a single noise.
_OF_SIMPLEX = ("octaves", "persistence", "wavelength", "z", "random_offset")
_SETTINGS = tuple(field.name for field in fields(NoiseSettings))
_SHOWN_FIRST = "AnoDDPM"


def list_reconstructing() -> list[str]:
    """Returns the names of the shipped checkpoints that reconstruct a slice at once, and whose network is their
    own."""
    records = shipped.list_shipped()
    methods = ("AnoDDPM", "ANDi")
    return [
        name
        for method in methods
        for name, record in records.items()
        if record["method"].startswith(method) and "unet" not in record["shares"]
    ]


def fill_explorer(page: gr.Blocks) -> None:
    """Fills a page, or a part of it, with the noise explorer."""
    first = explorer.read_preset(_SHOWN_FIRST)
    gr.Markdown(
        "# Noise explorer\nWhat diffusion models for anomaly detection do to a slice: their noise, at any step of their"
        " schedule, and what a network makes of it. The same seed gives the same picture."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            controls = _make_controls(first)
        with gr.Column(scale=3, min_width=480):
            note = gr.HTML(elem_id="explained")
            pictures = gr.HTML(elem_id="pictures")
            gr.Markdown("### One-shot reconstruction")
            reconstructed = gr.HTML(elem_id="reconstruction")
            gr.Markdown("### Spectrum, histogram and schedule")
            charts = gr.HTML(elem_id="charts")
            text = gr.Code(
                label="Configuration of what is seen",
                language="yaml",
                interactive=False,
                elem_id="yaml",
                buttons=["copy", "download"],
            )
    outputs = [note, pictures, reconstructed, charts, text]
    names, components = list(controls), list(controls.values())

    def show(*values) -> tuple:
        return _show(dict(zip(names, values, strict=True)))

    following = _connect(controls)
    alone = [component for name, component in controls.items() if name not in (*following, "file")]
    # What a hand changes, and not what follows it: each change is shown once, with all that belongs to it.
    changes = [page.load, controls["file"].change, *(component.input for component in alone)]
    gr.on(changes, show, components, outputs, show_progress="hidden", trigger_mode="always_last")
    for followed in following.values():
        followed.then(show, components, outputs, show_progress="hidden")
    sessions = Sessions()
    controls["file"].upload(sessions.keep, controls["file"], show_progress="hidden")
    page.unload(sessions.forget)
    page.unload(_forget)


def _make_controls(first: NoiseSettings) -> dict:
    """Makes the controls, in the order that they stand in, by the names of the settings."""
    made = {}
    made["preset"] = gr.Dropdown(list(PRESETS), value=_SHOWN_FIRST, label="Noise and schedule of", elem_id="preset")
    made["noise_type"] = gr.Radio(
        list(explorer.NOISE_TYPES), value=first.noise_type, label="Noise", elem_id="noise_type"
    )
    made["octaves"] = gr.Slider(1, 10, first.octaves, step=1, label="Octaves", elem_id="octaves")
    made["wavelength"] = gr.Slider(
        2, 256, first.wavelength, step=1, label="Longest wavelength (pixels; 1 / base frequency)", elem_id="wavelength"
    )
    made["persistence"] = gr.Slider(
        0.05, 1, first.persistence, step=0.05, label="Persistence (decay from octave to octave)"
    )
    made["discount"] = gr.Slider(
        0.1, 1, first.discount, step=0.05, label="Discount (decay from level to level)", visible=False
    )
    made["timestep"] = gr.Slider(
        0, first.num_train_timesteps - 1, first.timestep, step=1, label="Timestep t", elem_id="timestep"
    )
    made["seed"] = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
    with gr.Accordion("Schedule", open=False):
        made["beta_schedule"] = gr.Dropdown(
            SCHEDULES[first.noise_type],
            value=first.beta_schedule,
            label="Schedule",
            elem_id="schedule",
            # gradio would compare it with the first list of choices; the scheduler says what is wrong.
            allow_custom_value=True,
        )
        made["num_train_timesteps"] = gr.Slider(
            50, 2000, first.num_train_timesteps, step=1, label="Timesteps T (0 to T - 1)", elem_id="steps"
        )
        made["beta_start"] = gr.Number(first.beta_start, label="First beta, of a linear schedule")
        made["beta_end"] = gr.Number(first.beta_end, label="Last beta, of a linear schedule")
    with gr.Accordion("More of the noise", open=False):
        made["normalize"] = gr.Dropdown(
            NORMALIZATIONS[first.noise_type], value=first.normalize, label="Normalisation", allow_custom_value=True
        )
        made["z"] = gr.Dropdown(
            ["27", "10", "none", "timestep", "timestep_unscaled"],
            value=_say_depth(first.z),
            label="Third coordinate of simplex noise",
            allow_custom_value=True,
        )
        made["random_offset"] = gr.Checkbox(first.random_offset, label="Random offset, another one for every field")
    with gr.Accordion("Slice", open=True):
        made["source"] = gr.Radio([GENERATED, OWN], value=GENERATED, show_label=False, elem_id="source")
        made["file"] = gr.File(label="Picture (PNG, JPEG, ...) or NIfTI", visible=False, elem_id="own_file")
        made["contrast"] = gr.Dropdown(list(CONTRASTS), value=CONTRASTS[0], label="Contrast", elem_id="contrast")
        made["lesion"] = gr.Dropdown([NO_LESION, *LESIONS], value=LESIONS[0], label="Lesion")
        made["head"] = gr.Number(0, label="Which head", precision=0, minimum=0)
        made["place"] = gr.Slider(0, 100, _lesion_place(CONTRASTS[0], LESIONS[0], 0), step=1, label="Slice (%)")
        made["size"] = gr.Dropdown(list(SIZES), value=128, label="Size (pixels)")
    checkpoints = list_reconstructing()
    made["checkpoint"] = gr.Dropdown(
        [NO_CHECKPOINT, *checkpoints],
        value=checkpoints[0] if checkpoints else NO_CHECKPOINT,
        label="Reconstruct by the shipped checkpoint",
    )
    return made


def _connect(controls: dict) -> dict:
    """Lets controls follow others: a preset sets all of them, a noise type those that it has. Returns the names of
    those that others follow, with what happens then."""
    followers = [controls[name] for name in _SETTINGS]

    def follow_preset(name: str) -> list:
        settings = explorer.read_preset(name)
        return [_set(field, settings) for field in _SETTINGS]

    def follow_noise(noise_type: str, schedule: str, normalize: str) -> list:
        schedules, rules = SCHEDULES[noise_type], NORMALIZATIONS[noise_type]
        own = [gr.update(visible=noise_type == "simplex") for _ in _OF_SIMPLEX]
        return [
            gr.update(choices=schedules, value=schedule if schedule in schedules else schedules[0]),
            gr.update(choices=rules, value=normalize if normalize in rules else rules[0]),
            gr.update(visible=noise_type == "pyramid"),
            *own,
        ]

    def follow_source(source: str) -> list:
        generated = source == GENERATED
        return [gr.update(visible=not generated), *(gr.update(visible=generated) for _ in range(3))]

    of_head = [controls[name] for name in ("contrast", "lesion", "head")]
    rules = [controls[name] for name in ("beta_schedule", "normalize")]
    steps, timestep = controls["num_train_timesteps"], controls["timestep"]
    actions = {
        "preset": (follow_preset, controls["preset"], followers),
        "noise_type": (
            follow_noise,
            [controls["noise_type"], *rules],
            [*rules, *(controls[name] for name in ("discount", *_OF_SIMPLEX))],
        ),
        "num_train_timesteps": (
            lambda count, t: gr.update(maximum=count - 1, value=min(t, count - 1)),
            [steps, timestep],
            timestep,
        ),
        "source": (follow_source, controls["source"], [controls["file"], *of_head]),
        "lesion": (_lesion_place, of_head, controls["place"]),
        "head": (_lesion_place, of_head, controls["place"]),
    }
    return {name: controls[name].input(*action, show_progress="hidden") for name, action in actions.items()}


def _set(field: str, settings: NoiseSettings):
    """The update of a setting's control to its value."""
    value, noise_type = getattr(settings, field), settings.noise_type
    if field == "beta_schedule":
        return gr.update(choices=SCHEDULES[noise_type], value=value)
    if field == "normalize":
        return gr.update(choices=NORMALIZATIONS[noise_type], value=value)
    if field == "timestep":
        return gr.update(maximum=settings.num_train_timesteps - 1, value=value)
    if field == "discount":
        return gr.update(visible=noise_type == "pyramid", value=value)
    if field in _OF_SIMPLEX:
        return gr.update(visible=noise_type == "simplex", value=_say_depth(value) if field == "z" else value)
    return gr.update(value=value)


def _say_depth(z: float | str | None) -> str:
    return "none" if z is None else z if isinstance(z, str) else f"{z:g}"


def _lesion_place(contrast: str, lesion: str, head: int) -> int:
    """Where a generated head shows most of its lesion, in percent of its slices."""
    made = generate_head(contrast, None if lesion == NO_LESION else lesion, int(head or 0))
    return round(100 * made.middle / (made.image.shape[2] - 1))


def _show(values: dict) -> tuple:
    """What the page shows for the values of its controls: a note, pictures, reconstruction, charts and YAML."""
    try:
        settings = NoiseSettings(
            **{name: values[name] for name in _SETTINGS if name not in ("z", "wavelength")},
            z=explorer.read_depth(values["z"]),
            wavelength=float(values["wavelength"]),
        )
        image = take_slice(_prepare_plain(_source(values), int(values["size"])), values["place"])
        noised = explorer.noise_slice(image, settings, int(values["seed"] or 0))
    except (ValueError, TypeError, OSError) as error:
        return write_note(str(error), error=True), *(gr.skip(),) * 4
    preset = explorer.read_preset(values["preset"])
    changed = "" if settings == preset else ", changed"
    ratio = (noised.signal / noised.sigma) ** 2
    deviation = float(noised.noise.std())
    note = (
        f"{values['preset']}{changed}. At t = {settings.timestep} the slice has the weight {noised.signal:.3f} and the"
        f" noise {noised.sigma:.3f}: signal-to-noise ratio {ratio:.3g}, {10 * np.log10(ratio):.1f} dB. This noise has"
        f" the standard deviation {deviation:.3f}; the ratio counts it as 1."
    )
    pictures = [
        (explorer.draw_image(image), "slice, grey from -1 to 1"),
        (explorer.draw_image(noised.noise, -2.0, 2.0), "noise, grey from -2 to 2"),
        (explorer.draw_image(noised.noised), f"noised slice, t = {settings.timestep}"),
    ]
    images = {"slice": image, "noise": noised.noise, "noised slice": noised.noised}
    charts = [
        (explorer.draw_spectrum(images), "Radial power spectrum: power at each wavelength"),
        (explorer.draw_histogram(images), "Histogram of the pixels"),
        (explorer.draw_schedule(noised.scheduler, settings.timestep), "Schedule: weights at t"),
    ]
    return (
        write_note(note),
        write_pictures(pictures),
        _show_reconstruction(values, settings.timestep),
        write_charts(charts),
        explorer.write_settings(settings),
    )


def _show_reconstruction(values: dict, timestep: int) -> str:
    name = values["checkpoint"]
    if name == NO_CHECKPOINT:
        return write_note("No checkpoint is chosen.")
    try:
        pipeline, trained = _load(name)
        slices = take_slice(_prepare_for(name, _source(values)), values["place"])
        made = explorer.reconstruct(pipeline, slices, timestep, int(values["seed"] or 0))
    except (ValueError, TypeError, OSError) as error:
        return write_note(f"{name}: {error}", error=True)
    config, difference = pipeline.scheduler.config, made.slice - made.estimate
    if config.noise_type == "simplex":
        kind = f"simplex noise, {config.octaves} octaves from {config.wavelength:g} pixels"
    else:
        kind = f"pyramid noise, discount {config.discount}"
    note = (
        f"{name} was trained with {kind}, and t from {trained[0]} to {trained[1]}: it is given its own noise here, on"
        " slices of its own size, and not the noise above."
    )
    if not trained[0] <= timestep <= trained[1]:
        note += f" t = {timestep} is outside of that: the reconstruction means nothing there."
    pictures = [
        (explorer.draw_image(made.noised), f"noised by its own scheduler, t = {timestep}"),
        (explorer.draw_image(made.estimate), "one-shot reconstruction"),
        (explorer.draw_difference(difference, 0.5), "slice minus reconstruction: red from 0 to 0.5, blue below 0"),
    ]
    return write_note(note) + write_pictures(pictures)


def _source(values: dict) -> tuple:
    """What slice is meant, as something that caches can be looked up by."""
    if values["source"] == OWN:
        if values["file"] is None:
            raise ValueError("No file is there yet: choose a picture or a NIfTI file.")
        return (values["file"],)
    lesion = None if values["lesion"] == NO_LESION else values["lesion"]
    return values["contrast"], lesion, int(values["head"] or 0)


def take_slice(slices, place: float):
    """Takes the slice at `place` percent of those of a volume, the first at 0, the last at 100: an image `(H, W)` of
    an array `(N, H, W)`, one of a tensor `(N, C, H, W)` as `(1, C, H, W)`."""
    number = round(place / 100 * (len(slices) - 1))
    return slices[number : number + 1] if isinstance(slices, torch.Tensor) else slices[number]


@lru_cache(4)
def _prepare_plain(source: tuple, size: int) -> np.ndarray:
    """Slices `(N, H, W)` in [-1, 1] for the noise alone."""
    if len(source) == 3:
        head = generate_head(*source)
        rule = dict(crop="brain", intensity="brain_median", brain_mask="given", strip=True)
        processor = VolumeProcessor(size=(size, size), **rule)
        return processor.preprocess(head.image, head.brain).slices[:, 0].numpy()
    processor = VolumeProcessor(size=(size, size), brain_mask="none")
    return processor.preprocess(Path(source[0])).slices[:, 0].numpy()


@lru_cache(4)
def _prepare_for(name: str, source: tuple) -> torch.Tensor:
    """Slices `(N, 1, H, W)` as a shipped checkpoint sees them."""
    pipeline, _ = _load(name)
    if len(source) == 3:
        head = generate_head(*source)
        return pipeline.prepare_volume(head.image, head.brain).slices
    volume, brain = pipeline.processor.read(Path(source[0])), None
    if min(volume.shape) < 2:
        # Of a single picture the brain is not found: all that is not black counts.
        (array,) = volume.arrays.values()
        brain = volume.as_given((array > 0).astype(np.uint8))
    return pipeline.prepare_volume(volume, brain).slices


@lru_cache(2)
def _load(name: str) -> tuple[AnomalyPipeline, tuple[int, int]]:
    """A shipped checkpoint, and the timesteps that it was trained on."""
    objective = read_yaml(shipped.SHIPPED / name / "config.yaml")["objective"]
    pipeline = AnomalyPipeline.from_pretrained(name)
    return pipeline, (objective["min_timestep"], objective["max_timestep"])


def _forget() -> None:
    """Forgets the slices of files, which a visitor has uploaded."""
    _prepare_plain.cache_clear()
    _prepare_for.cache_clear()
