"""What every pipeline keeps, whatever its method is."""

import json
import logging
import re
from collections import deque
from collections.abc import Iterator

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset

import anodiff
from anodiff import AnomalyPipeline, DAEScheduler, HealthyMapsModel, VolumeProcessor
from anodiff.pipelines.base import NOT_FINITE
from anodiff.pipelines.postprocessing import brightness_weights
from anodiff.schedulers.draws import DRAWS_VERSION

from ..tiny import SETTINGS, SIZE, assert_same_map, make_pipeline, make_slices, make_volume


PIPELINES = [name for name in anodiff.__all__ if name.endswith("Pipeline") and name != "AnomalyPipeline"]
DRAWING = [name for name in PIPELINES if not getattr(anodiff, name).deterministic]


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request) -> AnomalyPipeline:
    return make_pipeline(request.param)


@pytest.fixture(scope="module", params=DRAWING)
def drawing(request) -> AnomalyPipeline:
    return make_pipeline(request.param)


def map_of(output):
    """The array that a pipeline is called for: the anomaly map, or the maps of the members."""
    return output.member_maps if hasattr(output, "member_maps") else output.anomaly_map


def tensor_of(pipe, count=3) -> torch.Tensor:
    return make_slices(count, len(pipe.processor.config.modalities), pipe.processor.config.value_range)


def test_every_pipeline_is_tested():
    assert set(PIPELINES) == set(SETTINGS)


def test_batch_size_does_not_matter(pipe):
    expected = map_of(pipe(make_volume(), batch_size=16))
    for size in (1, 3, 100):
        assert_same_map(map_of(pipe(make_volume(), batch_size=size)), expected, 1e-4)


def test_saved_and_loaded_it_gives_the_same_map(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = map_of(pipe(make_volume()))
    for kind in (type(pipe), AnomalyPipeline):
        loaded = kind.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe)
        assert_same_map(map_of(loaded(make_volume())), expected, 1e-6)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    for name in SETTINGS[type(pipe).__name__]:
        assert name in index
    assert index["processor"] == ["anodiff", "VolumeProcessor"]


@pytest.mark.parametrize("device_map", ["balanced", "auto", "tpu", {"unet": 0}], ids=str)
def test_a_pipeline_lies_on_one_device(device_map):
    """One with a component of its own, and one that it shares with other checkpoints."""
    pipe = AnomalyPipeline.from_pretrained("anoddpm-flair", device_map="cpu")
    assert {component.device.type for component in (pipe.unet, pipe.brain_extractor)} == {"cpu"}
    with pytest.raises(
        ValueError, match=r"`device_map` must be the name of a device of this machine, cpu.*`.to\(...\)` moves"
    ):
        AnomalyPipeline.from_pretrained("anoddpm-flair", device_map=device_map)


def test_every_kind_of_volume_gives_the_same_map(pipe, tmp_path):
    volume = make_volume()
    expected = map_of(pipe(volume))
    image = nib.Nifti1Image(volume, np.eye(4))
    nib.save(image, tmp_path / "scan.nii.gz")
    tensor = torch.from_numpy(volume)
    for kind in (tmp_path / "scan.nii.gz", str(tmp_path / "scan.nii.gz"), image, {"image": volume}, tensor):
        assert_same_map(map_of(pipe(kind)), expected)
    assert map_of(pipe(volume)).shape[-3:] == volume.shape


def test_tensors_of_two_and_three_dimensions_are_volumes(pipe, tmp_path):
    volume = make_volume((SIZE, SIZE))
    brain = volume > 0.2
    for given, mask in ((torch.from_numpy(volume), torch.from_numpy(brain)), (volume, brain)):
        flat = pipe(given, brain_mask=mask)
        assert isinstance(map_of(flat), np.ndarray) and map_of(flat).shape[-2:] == (SIZE, SIZE)
        assert not map_of(flat)[..., ~brain].any()
        flat.save(tmp_path / str(type(given).__name__))
    one, two = pipe([torch.from_numpy(make_volume()), torch.from_numpy(volume)])
    assert_same_map(map_of(one), map_of(pipe(make_volume())))
    assert_same_map(map_of(two), map_of(pipe(volume)))
    for wrong in (torch.zeros(5), torch.zeros(2, 1, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"must have the shape \(X, Y\) or \(X, Y, Z\), got"):
            pipe(wrong)


def of_numpy(value):
    """The same value as numpy has it."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(of_numpy, value))
    kinds = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    return kinds[type(value)](value) if type(value) in kinds else value


@pytest.mark.parametrize("name", PIPELINES)
def test_numbers_of_numpy_are_numbers(name, tmp_path):
    """In constructors and calls: they are taken, checked by the same limits, and can be saved."""
    plain = make_pipeline(name, threshold=0.25)
    settings = {
        key: plain.config[key] for key in plain.config if not key.startswith("_") and key not in plain.components
    }
    scheduler = type(plain.scheduler)(
        **{key: of_numpy(value) for key, value in plain.scheduler.config.items() if not key.startswith("_")}
    )
    numpy = make_pipeline(name, scheduler=scheduler, **{key: of_numpy(value) for key, value in settings.items()})
    numpy.save_pretrained(tmp_path / "pipeline")
    for kind in (numpy, type(plain).from_pretrained(tmp_path / "pipeline")):
        for config, expected in ((kind.config, plain.config), (kind.scheduler.config, plain.scheduler.config)):
            for key in set(expected) & set(config):
                if not key.startswith("_") and key not in plain.components:
                    assert json.loads(json.dumps(config[key])) == json.loads(json.dumps(expected[key])), key
    call = {key: of_numpy(value) for key, value in plain.default_settings().items()}
    output = plain(make_volume(), **call, threshold=np.float32(0.5), batch_size=np.int64(4), generator=np.int64(3))
    output.save(tmp_path / "out")
    assert_same_map(map_of(output), map_of(plain(make_volume(), generator=3)))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["threshold"] == 0.5


def test_pictures_have_pictures_as_results(pipe, tmp_path):
    picture = PIL.Image.fromarray((make_volume((20, 18)) * 200).astype(np.uint8))
    picture.save(tmp_path / "picture.png")
    output = pipe(picture)
    assert map_of(output).shape[-2:] == (20, 18)
    assert_same_map(map_of(pipe(tmp_path / "picture.png")), map_of(output))
    output.save(tmp_path / "out")
    assert (tmp_path / "out" / "result.json").exists() and list((tmp_path / "out").glob("*.png"))


def test_processed_slices_are_taken_as_they_are(pipe):
    slices = tensor_of(pipe)
    brain = torch.ones(3, SIZE, SIZE, dtype=torch.bool)
    brain[1], brain[2, :4] = False, False
    output = pipe(slices, brain_mask=brain)
    found = torch.as_tensor(map_of(output))
    assert isinstance(map_of(output), torch.Tensor) and found.shape[-3:] == (3, SIZE, SIZE)
    assert found[..., 0, :, :].abs().max() > 0 and not found[..., 1, :, :].any() and not found[..., 2, :4, :].any()
    with pytest.raises(ValueError, match="no grid"):
        output.save("anywhere")


def test_a_volume_without_brain_has_an_empty_map(pipe):
    output = pipe(tensor_of(pipe), brain_mask=torch.zeros(3, SIZE, SIZE, dtype=torch.bool))
    assert torch.as_tensor(map_of(output)).shape[-3:] == (3, SIZE, SIZE) and not torch.as_tensor(map_of(output)).any()


@pytest.mark.parametrize("name", PIPELINES)
def test_modalities_come_in_any_order(name):
    pipe = make_pipeline(name, ("t1", "flair"))
    t1, flair = make_volume(seed=1), make_volume(seed=2)
    expected = map_of(pipe({"t1": t1, "flair": flair}))
    assert_same_map(map_of(pipe({"flair": flair, "t1": t1})), expected)
    assert np.abs(map_of(pipe({"t1": flair, "flair": t1})) - expected).max() > 0


def test_a_list_gives_a_list_and_a_tuple_is_the_output(pipe):
    volumes = [make_volume(), make_volume((18, 20, 3), seed=1)]
    outputs = pipe(volumes)
    assert isinstance(outputs, list) and len(outputs) == 2
    for output, volume in zip(outputs, volumes, strict=True):
        assert_same_map(map_of(output), map_of(pipe(volume)))
    values = pipe(volumes[0], return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(outputs[0].to_tuple())
    assert_same_map(values[0], outputs[0].to_tuple()[0])
    with pytest.raises(ValueError, match="Masks of several volumes go into dicts"):
        pipe(volumes, brain_mask=volumes[0])


class _Keyed(torch.utils.data.Dataset):
    """Volumes that are told by their number and their count, as in the pipelines of transformers."""

    def __init__(self, volumes):
        self.volumes = volumes

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, index):
        return self.volumes[index % len(self.volumes)]


@pytest.mark.parametrize("give", [iter, _Keyed, deque], ids=["iterator", "dataset", "sequence"])
def test_volumes_that_come_one_by_one_give_results_one_by_one(give):
    pipe, volumes = make_pipeline("DAEPipeline"), [make_volume((18, 20, 2), seed) for seed in range(2)]
    results = pipe(give(volumes))
    assert isinstance(results, Iterator)
    for result, volume in zip(results, volumes, strict=True):
        assert_same_map(map_of(result), map_of(pipe(volume)))


def test_a_column_of_a_data_set_is_several_volumes():
    volumes = np.stack([make_volume((18, 20, 2), seed) for seed in range(2)])
    column = Dataset.from_dict({"scan": volumes}).with_format("numpy")["scan"]
    pipe = make_pipeline("DAEPipeline")
    for result, volume in zip(pipe(column), volumes, strict=True):
        assert_same_map(map_of(result), map_of(pipe(volume)))


def test_results_of_a_stream_are_found_when_they_are_asked_for():
    pipe, given = make_pipeline("DAEPipeline"), []

    def volumes():
        for volume in (make_volume((18, 20, 2)), np.full((18, 20, 2), np.nan), make_volume((18, 20, 2))):
            given.append(volume)
            yield volume

    results = pipe(volumes())
    assert not given
    next(results)
    assert len(given) == 1
    with pytest.raises(ValueError, match="NaN"):
        next(results)
    # What cannot be read does not end the stream.
    assert_same_map(map_of(next(results)), map_of(pipe(given[0])))
    with pytest.raises(StopIteration):
        next(results)
    with pytest.raises(ValueError, match="Masks of several volumes"):
        pipe(volumes(), brain_mask=given[0])
    with pytest.raises(
        TypeError, match=r"got tuple. A pipeline takes several as a list, or one by one as an iterator"
    ):
        pipe(tuple(given))


def test_a_call_is_logged_without_the_name_of_the_scan(pipe, tmp_path, caplog):
    scan = tmp_path / "Doe_Jane.nii.gz"
    nib.save(nib.Nifti1Image(make_volume(), np.eye(4)), scan)
    with caplog.at_level(logging.INFO, logger="anodiff"):
        pipe(scan)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("anodiff.pipelines.base", "INFO")
    said = rf"{type(pipe).__name__}: \d+ steps in [\d.e+-]+ s; brain mask: nonzero\."
    assert re.fullmatch(said, record.getMessage())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="anodiff"):
        pipe(scan)
    assert not caplog.records


def test_a_callback_is_told_of_every_step_and_may_end_the_call(pipe):
    volume, told = make_volume(), []
    expected = map_of(pipe(volume, batch_size=2, callback=lambda done, total: told.append((done, total))))
    numbers, totals = zip(*told, strict=True)
    assert numbers == tuple(range(1, len(told) + 1)) and totals == tuple(sorted(totals)) and totals[-1] == len(told)
    assert len(told) > 1
    ended = []

    def end(done, total):
        ended.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(volume, batch_size=2, callback=end)
    with pytest.raises(TypeError, match=r"`callback` must be a function of \(done, total\), got str"):
        pipe(volume, callback="end")
    assert ended == [1]
    # Nobody is told of the next call, which is as if nothing had happened.
    assert_same_map(map_of(pipe(volume, batch_size=2)), expected, 0.0)
    assert ended == [1] and len(told) == len(numbers)


def test_a_call_records_what_it_depends_on_and_changes_nothing(pipe):
    config, first = dict(pipe.config), pipe(make_volume())
    settings = {name: value for name, value in pipe.default_settings().items() if value is not None}
    assert settings.items() <= first.settings.items() and set(pipe.default_settings()) <= set(first.settings)
    drawn = {"seed": 0, "draws": DRAWS_VERSION}
    assert {name: first.settings.get(name) for name in drawn} == (
        dict.fromkeys(drawn) if pipe.deterministic else drawn
    )
    json.dumps(first.settings)
    assert dict(pipe.config) == config
    again = pipe(make_volume(), threshold=np.float32(0.25))
    assert again.settings["threshold"] == 0.25 and dict(pipe.config) == config
    assert_same_map(map_of(again), map_of(first), 1e-6)


def test_a_threshold_cuts_the_map(pipe):
    maps = map_of(pipe(tensor_of(pipe)))
    threshold = min(float(maps.median()), 0.9)
    output = pipe(tensor_of(pipe), threshold=threshold)
    masks = output.member_masks if hasattr(output, "member_masks") else output.pred_mask
    assert masks.dtype == torch.uint8 and torch.equal(masks.bool(), map_of(output) > threshold)


def test_the_progress_bar_is_silent_when_asked(pipe, capfd):
    pipe(make_volume())
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(make_volume())
    pipe.set_progress_bar_config(disable=True)
    assert "%" in capfd.readouterr().err


def test_the_seed_decides(drawing):
    volume = make_volume()
    default = map_of(drawing(volume))
    for same in (0, np.int64(0), torch.Generator().manual_seed(0)):
        assert_same_map(map_of(drawing(volume, generator=same)), default, 1e-6)
    assert np.abs(map_of(drawing(volume, generator=1)) - default).max() > 1e-3 * np.abs(default).max()
    # A generator of the caller, or torch's own, is not advanced.
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    drawing(volume, generator=generator)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3))


def test_slices_and_draws_have_noise_of_their_own(drawing):
    asked = []

    def noise(draws, indices, shape):
        asked.extend(zip(draws, indices, strict=True))
        assert shape[0] == len(draws)
        return torch.stack(
            [torch.full(shape[1:], 0.1 * draw + 0.01 * index) for draw, index in zip(draws, indices, strict=True)]
        )

    drawing(tensor_of(drawing), noise=noise)
    assert len(set(asked)) > 1 and {index for _, index in asked} == {0, 1, 2}
    assert sorted({draw for draw, _ in asked}) == list(range(max(draw for draw, _ in asked) + 1))


def test_given_noise_has_one_form(drawing):
    """A callable that looks up a tensor is that tensor."""
    count, shape = 0, None

    def measure(draws, indices, wanted):
        nonlocal count, shape
        count, shape = max(count, *(draw + 1 for draw in draws)), wanted[1:]
        return torch.zeros(wanted)

    slices = tensor_of(drawing)
    drawing(slices, noise=measure)
    noise = torch.randn(count, len(slices), *shape, generator=torch.Generator().manual_seed(1))
    expected = map_of(drawing(slices, noise=noise))
    assert_same_map(
        map_of(drawing(slices, noise=lambda draws, indices, _: noise[draws, indices], batch_size=2)), expected, 1e-4
    )
    assert drawing(slices, noise=noise).settings["seed"] is None
    for wrong in (noise[:, :2], noise[..., :8], noise[0]):
        with pytest.raises(ValueError, match=r"`noise` must have the shape \("):
            drawing(slices, noise=wrong)
    with pytest.raises(ValueError, match="either `noise` or `generator`"):
        drawing(slices, noise=noise, generator=1)


def test_several_volumes_share_batches_but_nothing_else(pipe):
    """`map_slices`, the way of an evaluation: two volumes at once are two calls."""
    slices, brain = tensor_of(pipe, 6), torch.ones(6, SIZE, SIZE, dtype=torch.bool)
    brain[1] = False
    indices = [0, 1, 2, 0, 1, 2]
    together = pipe.map_slices(slices, brain, indices, volumes=[3, 3])
    for rows in (slice(0, 3), slice(3, 6)):
        alone = pipe(slices[rows], brain_mask=brain[rows])
        maps = map_of(alone).movedim(0, 1) if hasattr(alone, "member_maps") else map_of(alone)
        assert_same_map(together.maps[rows], maps, 1e-4)
    assert together.added is None and together.maps.dtype == torch.float32


def weighted(settings: dict) -> dict:
    """Settings that weigh maps in every way, with a component that divides by 2 in the first slice, and 4 in the last."""
    healthy_maps = HealthyMapsModel(SIZE, SIZE, depth=2)
    healthy_maps.levels.copy_(torch.tensor([2.0, 4.0])[:, None, None].expand(2, SIZE, SIZE))
    return settings | {"healthy_maps": healthy_maps, "normalization": "healthy_maps"}


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "CIMDPipeline"])
def test_maps_of_every_method_are_weighted(name):
    pipe = make_pipeline(name, **weighted({"sign": "darker", "weighting": "intensity"}))
    plain = make_pipeline(name)
    slices, brain = tensor_of(pipe, 3), torch.ones(3, SIZE, SIZE, dtype=torch.bool)
    brain[:, :3] = False
    weights = brightness_weights(pipe.processor.to_unit(slices).numpy(), brain.numpy(), "darker", "intensity")
    divided = torch.from_numpy(weights) / torch.tensor([2.0, 3.0, 4.0])[:, None, None]
    expected = plain(slices, brain_mask=brain).anomaly_map * divided
    output = pipe(slices, brain_mask=brain)
    assert_same_map(output.anomaly_map, expected)
    assert output.volume_score == pytest.approx(float(expected[brain].double().mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["ANDiPipeline", "AnoDDPMPipeline"])
def test_weights_come_before_the_filter_and_volumes_share_nothing(name):
    settings = {"sign": "brighter", "weighting": "intensity", "median_size": 3}
    pipe = make_pipeline(name, ("flair", "t1"), **weighted(settings))
    slices, brain = tensor_of(pipe, 7), torch.ones(7, SIZE, SIZE, dtype=torch.bool)
    slices[3:] = slices[3:] / 2 - 0.5  # another volume, darker
    brain[1], brain[6] = False, False
    indices = [0, 1, 2, 5, 6, 7, 8]
    together = pipe.map_slices(slices, brain, indices, volumes=[3, 4], batch_size=5).maps
    for rows in (slice(0, 3), slice(3, 7)):
        alone = pipe.map_slices(slices[rows], brain[rows], indices[rows], batch_size=1).maps
        assert_same_map(together[rows], alone, 1e-4)
    assert not together[1].any() and not together[6].any()
    plain = make_pipeline(name, ("flair", "t1"), median_size=0).map_slices(slices[:3], brain[:3], [0, 1, 2]).maps
    weights = brightness_weights(
        pipe.processor.to_unit(slices[:3]).numpy(), brain[:3].numpy(), "brighter", "intensity"
    )
    divided = plain.numpy() * weights / np.array([2.0, 3.0, 4.0], np.float32)[:, None, None]
    assert_same_map(together[:3], pipe.postprocessing.filter(divided, brain[:3].numpy()), 1e-4)


def test_masks_of_the_method_hold_no_pixel_without_weight():
    settings = {"similarity_threshold": 1.0, "gap_scale": (1e9,)}
    slices = tensor_of(make_pipeline("AnoFPDMPipeline"))
    masks = [
        make_pipeline("AnoFPDMPipeline", sign=sign, **settings)(slices).pred_mask.bool()
        for sign in ("both", "brighter", "darker")
    ]
    bright = slices[:, 0] > slices.flatten(1).quantile(0.5, 1)[:, None, None]
    assert (masks[0] & bright).any() and (masks[0] & ~bright).any()
    assert torch.equal(masks[1], masks[0] & bright) and torch.equal(masks[2], masks[0] & ~bright)


def test_healthy_maps_are_a_component_of_the_checkpoint(tmp_path):
    pipe = make_pipeline("AnoDDPMPipeline", **weighted({}))
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    loaded = AnomalyPipeline.from_pretrained(tmp_path)
    assert loaded.config.normalization == "healthy_maps"
    loaded.set_progress_bar_config(disable=True)
    assert_same_map(loaded(make_volume()).anomaly_map, pipe(make_volume()).anomaly_map)
    off = AnomalyPipeline.from_pretrained(tmp_path, normalization="none")
    off.set_progress_bar_config(disable=True)
    assert_same_map(off(make_volume()).anomaly_map, make_pipeline("AnoDDPMPipeline")(make_volume()).anomaly_map)


def test_healthy_maps_must_be_there_and_fit():
    with pytest.raises(ValueError, match="`normalization` healthy_maps needs the component `healthy_maps`"):
        make_pipeline("ANDiPipeline", normalization="healthy_maps")
    with pytest.raises(ValueError, match=r"`healthy_maps` must have the `size` of the processor, .*, got \(8, 16\)"):
        make_pipeline("ANDiPipeline", healthy_maps=HealthyMapsModel(8, SIZE))


def test_a_filter_does_not_cross_volumes():
    pipe = make_pipeline("ANDiPipeline", median_size=3, median_dimensions=3)
    slices, brain = tensor_of(pipe, 6), torch.ones(6, SIZE, SIZE, dtype=torch.bool)
    maps = {
        volumes: pipe.map_slices(slices, brain, [0, 1, 2, 0, 1, 2], volumes=volumes).maps for volumes in ((3, 3), (6,))
    }
    alone = torch.cat([torch.as_tensor(pipe(part).anomaly_map) for part in slices.split(3)])
    assert_same_map(maps[3, 3], alone, 1e-4)
    assert (maps[6,] - alone).abs().max() > 1e-2 * alone.max()


def test_a_damaged_network_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    damaged = type(pipe).from_pretrained(tmp_path)
    damaged.set_progress_bar_config(disable=True)
    with torch.no_grad():
        list(damaged.unet.parameters())[-1].fill_(float("nan"))
    with pytest.raises(ValueError, match=NOT_FINITE[:40]):
        damaged(make_volume())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, "`batch_size` must be an integer of at least 1, got 2.0"),
        ({"batch_size": np.int64(0)}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"threshold": np.float32("nan")}, "`threshold` must be .* got nan"),
        ({"threshold": "high"}, "`threshold` must be .* got 'high'"),
        ({"threshold": float("nan")}, "`threshold` must be .* got nan"),
        ({"generator": -1}, "`generator` must be an integer >= 0"),
        (
            {"brain_mask": torch.ones(2, SIZE, SIZE)},
            r"`brain_mask` must have the shape \(3, 16, 16\), got \(2, 16, 16\)",
        ),
    ],
)
def test_wrong_arguments(pipe, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(tensor_of(pipe), **arguments)


def test_wrong_tensors(pipe):
    for tensor, message in (
        (torch.zeros(3, 2, SIZE, SIZE), r"must have the shape \(N, 1, H, W\) with N >= 1, got \(3, 2, 16, 16\)"),
        (torch.zeros(0, 1, SIZE, SIZE), "with N >= 1"),
        (torch.full((3, 1, SIZE, SIZE), float("nan")), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(tensor)


@pytest.mark.parametrize("name", PIPELINES)
def test_components_that_do_not_fit_are_refused_at_once(name):
    for component in ("scheduler", "unet", "processor"):
        wrong = torch.nn.Linear(1, 1) if component == "unet" else DAEScheduler()
        if name == "DAEPipeline" and component == "scheduler":
            wrong = anodiff.ANDiScheduler()
        with pytest.raises(TypeError, match=f"`{component}` must be a .*, got {type(wrong).__name__}"):
            make_pipeline(name, **{component: wrong})
    other = make_pipeline(name, ("t1", "flair", "t2"))
    with pytest.raises(ValueError, match="`unet` must have .* `in_channels` for the modalities image, got"):
        make_pipeline(name, unet=other.unet)


@pytest.mark.parametrize("name", PIPELINES)
def test_settings_are_checked_when_a_pipeline_is_made(name):
    with pytest.raises(ValueError, match="`threshold` must be"):
        make_pipeline(name, threshold="high")
    with pytest.raises(ValueError, match="`median_size` must"):
        make_pipeline(name, median_size=-1)
    with pytest.raises(TypeError):
        make_pipeline(name, no_such_setting=1)


def test_speed_options_change_little(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    fast = type(pipe).from_pretrained(tmp_path)
    fast.set_progress_bar_config(disable=True)
    fast.enable_fast_inference()
    expected = map_of(pipe(make_volume()))
    assert_same_map(map_of(fast(make_volume())), expected, 1e-3)
    # Every network takes weights of another type.
    fast.enable_fast_inference(mixed_precision="bf16")
    coarse = map_of(fast(make_volume()))
    assert (
        np.asarray(coarse).dtype == np.float32 and 0 < np.abs(coarse - expected).mean() < 0.2 * np.abs(expected).mean()
    )


def test_the_base_names_what_it_cannot_load(tmp_path):
    with pytest.raises(FileNotFoundError):
        AnomalyPipeline.from_pretrained(tmp_path / "nothing")
    make_pipeline("DAEPipeline").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DAEPipeline, not a ANDiPipeline"):
        anodiff.ANDiPipeline.from_pretrained(tmp_path)
    assert isinstance(AnomalyPipeline.from_pretrained(tmp_path).processor, VolumeProcessor)
