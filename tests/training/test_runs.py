"""What a training keeps, refuses and leaves: checkpoints, resume, its folder, values that are not finite, the pipeline folder."""

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from anodiff import AnoDDPMPipeline, AnomalyPipeline, BrainExtractor, HealthyMapsModel
from anodiff.data.prepare import prepare
from anodiff.data.readers.subjects import Subject
from anodiff.files import lock_folder
from anodiff.running import Stopped
from anodiff.training import checkpoints as checkpoint_files
from anodiff.training import export as export_files
from anodiff.training import loop as loop_files
from anodiff.training.checkpoints import RECORD, list_checkpoints, set_aside
from anodiff.training.loop import fit
from anodiff.training.objective_cddpm import load_encoder
from anodiff.training.objective_guided import (
    ClassifierObjective,
    DDIBObjective,
    GuidedObjective,
    LearnedSigmaObjective,
    load_classifier,
)
from anodiff.training.objective_noise import ANDiObjective, NoiseObjective
from anodiff.training.objective_sadm import LabelledSADMObjective, SADMObjective
from anodiff.training.options import MAY_CHANGE, DataOptions, LoopOptions, OptimOptions, TrainOptions, check_resumed
from anodiff.training.state import plain
from anodiff.volumes.processor import VolumeProcessor

from ..tiny import SIZE, make_pipeline


UNET = {
    **{"block_out_channels": [4], "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False},
    **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
}

CLASSIFIER = {
    **{"_class_name": "NoisyClassifierModel", "block_out_channels": [32, 32], "layers_per_block": 1},
    **{"attention_levels": [], "attention_head_dim": 16},
}


def make_data(
    root: Path,
    seed: int = 0,
    modalities: tuple[str, ...] = ("t1",),
    labels: tuple[int | None, ...] = (0, 1, 0),
) -> Path:
    root.mkdir()
    subjects = []
    for number, split in enumerate(("train", "train", "validation")):
        volume = np.random.default_rng([seed, number]).uniform(1, 9, (8, 8, 5)).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), root / f"{number}.nii.gz")
        files = dict.fromkeys(modalities, root / f"{number}.nii.gz")
        subjects.append(Subject(f"s{seed}{number}", files, split=split, label=labels[number]))
    processor = VolumeProcessor(modalities=modalities, size=(8, 8))
    assert prepare(subjects, processor, root / "set", recipe={"name": "tiny"}, progress=False) == {}
    return root / "set"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared set of 8 x 8 pixels: a healthy and an anomalous subject to learn from, one to validate on."""
    return make_data(tmp_path_factory.mktemp("runs") / "raw")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def train(data, tmp_path):
    """`train(step, kind, **options)` trains to a step in `tmp_path/run`, with a checkpoint of every one."""

    def run(
        steps: int, kind=NoiseObjective, *, optim=None, data_path=data, method="anoddpm", streaming=False, **changes
    ):
        kinds = ("unet", "scheduler", "processor", "inference", "objective")
        blocks = {name: changes.pop(name) for name in kinds if name in changes}
        loop = {"output_dir": str(tmp_path / "run"), "max_steps": steps, "batch_size": 2, "log_every": 1}
        loop |= {"validate_every": 0, "checkpoint_every": 1, "checkpoint_limit": 9, "report_to": "none", **changes}
        options = TrainOptions(
            method=method,
            data=DataOptions(path=str(data_path), streaming=streaming),
            train=LoopOptions(**loop),
            optim=OptimOptions(**(optim or {})),
            **{"unet": UNET, **blocks},
        )
        return fit(options, kind).parent

    return run


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Checkpoints


def test_what_a_user_keeps_beside_the_checkpoints_stays(train, tmp_path):
    run = train(2)
    folder = run / "checkpoints"
    for name in ("step-0000001-good", "step-0000001.bak", "step-0000001 (copy)", "step-0000009.partial", "step-9"):
        shutil.copytree(folder / "step-0000001", folder / name)
    (folder / "step-0000004.txt").write_text("mine")
    (folder / "step-٠٠٠٠٠٠٩").mkdir()
    os.symlink(folder / "step-0000001-good", folder / "best")
    before = tree(folder)
    mine = {
        name: content for name, content in before.items() if not name.startswith(("step-0000001/", "step-0000002/"))
    }
    assert train(4, resume="latest", checkpoint_limit=1) == run
    after = tree(folder)
    assert {name: after.get(name) for name in mine} == mine and (folder / "best").is_symlink()
    assert [path.name for path in list_checkpoints(run)] == ["step-0000004"]
    # A copy can be named.
    train(3, resume=str(folder / "step-0000001-good"), checkpoint_limit=1)
    assert steps_of(run) == [1, 2, 3]
    assert [path.name for path in list_checkpoints(run)] == ["step-0000003"]
    after = tree(folder)
    assert {name: after.get(name) for name in mine} == mine


@pytest.mark.parametrize("damage", ["empty", "file", "missing", "cut", "record", "renamed"])
def test_what_is_not_whole_is_no_checkpoint_and_stays(train, capsys, damage):
    run = train(2)
    broken = run / "checkpoints" / "step-0000003"
    if damage == "file":
        broken.write_text("mine")
    elif damage == "empty":
        broken.mkdir()
    else:
        shutil.copytree(run / "checkpoints" / "step-0000002", broken)
        if damage != "renamed":
            record = json.loads((broken / RECORD).read_text()) | {"step": 3}
            (broken / RECORD).write_text(json.dumps(record))
        if damage == "missing":
            (broken / "optimizer.bin").unlink()
        if damage == "cut":
            (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1])
        if damage == "record":
            (broken / RECORD).write_text('{"step"')
    content = tree(broken) if broken.is_dir() else None
    if damage != "file":
        with pytest.raises(ValueError, match="step-0000003 is no whole checkpoint: "):
            train(4, resume=str(broken))
    train(4, resume="latest")
    assert "at step 2." in capsys.readouterr().out and steps_of(run) == [1, 2, 3, 4]
    moved = run / "set-aside" / "after-step-0000002" / "checkpoints" / "step-0000003"
    assert tree(moved) == content if moved.is_dir() else moved.read_text() == "mine"
    assert [path.name for path in list_checkpoints(run)] == [f"step-000000{step}" for step in (1, 2, 3, 4)]


def test_only_damaged_checkpoints(train, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-0000002").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint that is whole: .*step-0000002 \(optimizer.bin is missing"
    ):
        train(1, resume="latest")
    run = train(1)
    assert names(run / "set-aside" / "after-step-0000000" / "checkpoints") == ["step-0000002"]


def test_checkpoints_are_counted_not_spelled(tmp_path):
    for step in (9_999_999, 10_000_000, 42):
        folder = tmp_path / "checkpoints" / f"step-{step:07d}"
        folder.mkdir(parents=True)
        (folder / RECORD).write_text(json.dumps({"step": step, "files": {}}))
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [42, 9_999_999, 10_000_000]


@pytest.mark.parametrize("place", ["replace", "remove"])
def test_a_stop_while_saving_loses_nothing(train, monkeypatch, place):
    run = train(1)

    def stop(*_):
        raise Stopped(15)

    with monkeypatch.context() as patch:
        # Before the new checkpoint has its name, and while an old one goes.
        if place == "replace":
            replace = os.replace
            named = lambda path, target: stop() if "checkpoints" in str(target) else replace(path, target)  # noqa: E731
            patch.setattr(checkpoint_files.os, "replace", named)
        else:
            patch.setattr(checkpoint_files.shutil, "rmtree", lambda path, **_: stop() if Path(path).exists() else None)
        with pytest.raises(Stopped):
            train(3, resume="latest", checkpoint_limit=1)
    assert [path.name for path in list_checkpoints(run)] == ["step-0000001" if place == "replace" else "step-0000002"]
    assert any(name.startswith(".partial.") for name in names(run / "checkpoints"))
    train(3, resume="latest", checkpoint_limit=1)
    assert names(run / "checkpoints") == ["step-0000003"] and steps_of(run) == [1, 2, 3]


# Resume


def test_another_way_from_an_earlier_checkpoint(train, capsys):
    run = train(3, validate_every=1)
    old = tree(run / "checkpoints" / "step-0000003")
    log = (run / "log.jsonl").read_text().splitlines()
    train(2, resume=str(run / "checkpoints" / "step-0000001"), checkpoint_limit=1, validate_every=1)
    said = capsys.readouterr().out
    place = run / "set-aside" / "after-step-0000001"
    assert f"was moved to {place}." in said
    assert names(place / "checkpoints") == ["step-0000002", "step-0000003"]
    assert tree(place / "checkpoints" / "step-0000003") == old
    assert names(place / "samples") == ["step-0000002.png", "step-0000003.png"]
    assert (place / "log.jsonl").read_text().splitlines() == log[2:]
    assert names(run / "samples") == ["step-0000001.png", "step-0000002.png"] and steps_of(run) == [1, 1, 2, 2]
    # The new one is not taken for the older one, and is where `latest` goes on.
    assert [path.name for path in list_checkpoints(run)] == ["step-0000002"]
    train(3, resume="latest")
    assert steps_of(run) == [1, 1, 2, 2, 3] and names(run / "set-aside") == ["after-step-0000001"]
    # Nothing that was set aside is replaced.
    train(2, resume=str(run / "checkpoints" / "step-0000002"))
    train(3, resume="latest")
    train(2, resume=str(run / "checkpoints" / "step-0000002"))
    assert names(run / "set-aside") == ["after-step-0000001", "after-step-0000002", "after-step-0000002-2"]


def test_the_history_of_the_validation_goes_on_after_a_stop(train):
    def history(folder):
        return [json.loads(line) for line in (folder / "pipeline" / "validation.jsonl").read_text().splitlines()]

    run = train(2, validate_every=1)
    first = history(run)
    assert [set(line) for line in first] == [{"step", "validation_loss"}] * 2
    picture = (run / "losses.png").read_bytes()
    train(4, validate_every=2, resume="latest")
    longer = history(run)
    assert longer[:2] == first and [line["step"] for line in longer] == [1, 2, 4]
    card = (run / "pipeline" / "README.md").read_text()
    assert all(f"\n| {line['step']} | {line['validation_loss']:.3f} |\n" in card for line in longer)
    assert (run / "losses.png").read_bytes() != picture and "losses.png" not in names(run / "pipeline")
    # Another way from an earlier step has none of what lay behind it, and a step is not there twice.
    train(3, validate_every=1, resume=str(run / "checkpoints" / "step-0000001"))
    other = history(run)
    assert [line["step"] for line in other] == [1, 2, 3] and other[:2] == first


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', '{"step"', "\0\0\0\0", "3", "[]", '{"loss": 1}', '{"step": 2, "loss": 0.5}']
)
def test_a_torn_line_of_the_log(train, torn):
    run = train(2)
    with open(run / "log.jsonl", "a") as file:
        file.write(torn)  # and no end of the line
    train(3, resume="latest")
    lines = (run / "log.jsonl").read_text().splitlines()
    whole = torn.startswith('{"step": 2')
    assert [json.loads(line)["step"] for line in lines] == ([1, 2, 2, 3] if whole else [1, 2, 3])
    if not whole:
        assert (run / "set-aside" / "after-step-0000002" / "log.jsonl").read_text() == torn + "\n"


def test_the_log_is_whole_after_a_stop(train, monkeypatch):
    run = train(2)
    before = (run / "log.jsonl").read_bytes()

    def stop(*_):
        raise Stopped(15)

    monkeypatch.setattr("anodiff.files.os.replace", stop)
    with pytest.raises(Stopped):
        set_aside(run, 1)
    assert (run / "log.jsonl").read_bytes() == before and steps_of(run / "set-aside" / "after-step-0000001") == [2]


def test_a_run_that_ended_before_its_first_checkpoint(train, tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples" / "step-0000005.png").write_bytes(b"a picture")
    (run / "samples" / "step-5.png").write_bytes(b"mine")
    (run / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    train(1)
    place = run / "set-aside" / "after-step-0000000"
    assert (place / "samples" / "step-0000005.png").read_bytes() == b"a picture" and steps_of(place) == [1]
    assert (run / "samples" / "step-5.png").exists() and steps_of(run) == [1]


def test_a_checkpoint_of_another_run(train, tmp_path):
    one = train(2)
    checkpoint = str(one / "checkpoints" / "step-0000001")
    other = train(2, output_dir=str(tmp_path / "other"), resume=checkpoint)
    assert steps_of(other) == [2] and [path.name for path in list_checkpoints(other)] == ["step-0000002"]
    before = tree(other)
    with pytest.raises(FileExistsError, match="which holds others. Choose another `--train.output_dir`"):
        train(2, output_dir=str(other), resume=checkpoint)
    assert tree(other) == before


def test_a_checkpoint_of_an_earlier_version(train, capsys):
    run = train(2)
    for checkpoint in list_checkpoints(run):
        (checkpoint / RECORD).unlink()
    train(3, resume="latest")
    assert "does not say what it was trained with" in capsys.readouterr().out and steps_of(run) == [1, 2, 3]


def test_fewer_steps_than_the_checkpoint(train):
    run = train(2)
    with pytest.raises(ValueError, match="`train.max_steps` is 1, but .*step-0000002 is of step 2"):
        train(1, resume="latest")
    assert steps_of(run) == [1, 2]


def test_a_checkpoint_that_cannot_be_loaded(train):
    run = train(1)
    (run / "checkpoints" / "step-0000001" / "custom_checkpoint_1.pkl").write_bytes(b"x" * 9)
    record = run / "checkpoints" / "step-0000001" / RECORD
    values = json.loads(record.read_text())
    values["files"]["custom_checkpoint_1.pkl"] = 9
    record.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="step-0000001 cannot be gone on from") as raised:
        train(2, resume="latest")
    assert "\n" not in str(raised.value)


def changed(value):
    if isinstance(value, dict):
        return {**value, "another": 1}
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [changed(value[0]), *value[1:]]
    return "another"


def every_option(values: dict, above: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        within = (
            isinstance(value, dict) and value and above + name not in ("unet", "scheduler", "inference", "objective")
        )
        found += every_option(value, f"{above}{name}.") if within else [above + name]
    return found


def with_change(options: dict, name: str, value=None) -> dict:
    options = copy.deepcopy(options)
    *blocks, last = name.split(".")
    block = options
    for each in blocks:
        block = block[each]
    block[last] = changed(block[last]) if value is None else value
    return options


def test_every_option_is_the_checkpoint_s_or_may_change():
    # A schedule that does not end: with others the number of steps is one of those that may not.
    options = plain(TrainOptions())
    found = every_option(options)
    assert {"optim.learning_rate", "train.ema.decay", "train.max_steps", "unet", "data.augmentation.gamma"} <= set(
        found
    )
    for name in found:
        if name in ("optim.lr_total_steps",):
            continue
        if name in MAY_CHANGE:
            check_resumed("it", options, with_change(options, name))
        else:
            with pytest.raises(ValueError, match=rf"it was trained with other options: `{name}(\.another)?` was "):
                check_resumed("it", options, with_change(options, name))
    with pytest.raises(
        ValueError, match=r"`optim.learning_rate` was 0.0001, is 1.0001; `train.seed` was 0, is 1\. Give"
    ):
        check_resumed("it", options, with_change(with_change(options, "train.seed"), "optim.learning_rate"))


@pytest.mark.parametrize(
    ("schedule", "saved", "own", "fits"),
    [
        ("constant_with_warmup", (10, None), (20, None), True),
        ("constant", (10, None), (20, 15), True),
        ("cosine", (10, None), (20, None), False),
        ("cosine", (10, None), (20, 10), True),
        ("cosine", (5, 10), (10, None), True),
        ("linear", (10, 10), (10, 12), False),
        ("polynomial", (10, None), (9, None), False),
    ],
)
def test_the_length_of_a_schedule(schedule, saved, own, fits):
    def options(steps, total):
        return plain(
            TrainOptions(
                optim=OptimOptions(lr_scheduler=schedule, lr_total_steps=total), train=LoopOptions(max_steps=steps)
            )
        )

    if fits:
        check_resumed("it", options(*saved), options(*own))
    else:
        with pytest.raises(ValueError, match=r"`optim.lr_total_steps` \(`train.max_steps` by default\) was 10"):
            check_resumed("it", options(*saved), options(*own))


def test_options_of_an_open_block_and_of_other_versions():
    options = plain(TrainOptions(objective={"loss": "l1", "encoder_path": "a"}, inference={"patch_size": 8}))
    for block, values, message in (
        ("objective", {"encoder_path": "a"}, r"`objective.loss` was 'l1', is not given"),
        ("objective", {"loss": "l1", "encoder_path": "b"}, r"`objective.encoder_path` was 'a', is 'b'"),
        ("scheduler", {"octaves": 3}, r"`scheduler.octaves` was not given, is 3"),
        ("inference", {"patch_size": 4}, r"`inference.patch_size` was 8, is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            check_resumed("it", options, options | {block: values})
    check_resumed("it", options, options | {"inference": {"patch_size": 8, "threshold": 0.5}})
    older = copy.deepcopy(options)
    del older["optim"]["start_lr"]
    check_resumed("it", older, options)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"optim": {"learning_rate": 1e-2}}, "optim.learning_rate"),
        ({"optim": {"weight_decay": 0.1}}, "optim.weight_decay"),
        ({"optim": {"betas": (0.5, 0.9)}}, "optim.betas"),
        ({"ema": {"enabled": False}}, "train.ema.enabled"),
        ({"ema": {"decay": 0.5}}, "train.ema.decay"),
        ({"seed": 1}, "train.seed"),
        ({"unet": UNET | {"dropout": 0.5}}, "unet.dropout"),
        ({"processor": {"context": 1}}, "processor.context"),
    ],
)
def test_what_a_checkpoint_fixes_is_refused(train, tmp_path, change, name):
    if "ema" in change:
        change = {"ema": dataclasses.replace(LoopOptions().ema, **change["ema"])}
    run = train(1)
    before = tree(run)
    with pytest.raises(ValueError, match=f"other options: `{name}` was .*start a new run"):
        train(2, resume="latest", **change)
    assert tree(run) == before


def test_what_may_change_takes_effect(train):
    run = train(2)
    train(6, resume="latest", batch_size=1, gradient_accumulation_steps=2, log_every=2, checkpoint_every=3)
    assert steps_of(run) == [1, 2, 3, 4, 6] and names(run / "checkpoints")[2:] == ["step-0000003", "step-0000006"]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["log_every"] == 2


def test_the_data_are_compared_by_what_they_are(train, data, tmp_path):
    run = train(1)
    moved = shutil.copytree(data, tmp_path / "moved")
    train(2, resume="latest", data_path=moved)
    other = make_data(tmp_path / "more", seed=1)
    with pytest.raises(ValueError, match="was trained on other data than `data.path` .*more"):
        train(3, resume="latest", data_path=other)
    assert steps_of(run) == [1, 2]


def test_a_training_with_neighbours_goes_on_and_is_a_start(train, tmp_path):
    context = {"processor": {"context": 1}}
    whole = train(4, **context, validate_every=2).rename(tmp_path / "whole")
    pipe = AnomalyPipeline.from_pretrained(whole / "pipeline")
    assert pipe.processor.config.context == 1 and pipe.unet.config.in_channels == pipe.unet.config.out_channels == 3
    assert len(names(whole / "samples")) == 2 and "| `context` | 1 |" in (whole / "pipeline/README.md").read_text()
    train(2, **context, validate_every=2)
    run = train(4, resume="latest", **context, validate_every=2)
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=0)
    shutil.rmtree(run)
    run = train(1, init_from=str(whole / "pipeline"), unet={}, optim={"learning_rate": 0.0})
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=0)
    assert AnomalyPipeline.from_pretrained(run / "pipeline").processor.config.context == 1


def test_channels_of_the_network_follow_from_the_neighbours(train):
    with pytest.raises(ValueError, match="`unet.in_channels` must be 3, the number of modalities of the slice and of"):
        train(1, processor={"context": 1}, unet=UNET | {"in_channels": 1})


# Beginning with the weights of a pipeline


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def start(train, tmp_path):
    """The pipeline of an earlier run, with values of its own and a brain extractor."""
    run = train(2, scheduler={"wavelength": 4.0, "octaves": 2})
    folder = run.rename(tmp_path / "earlier") / "pipeline"
    parts = AnomalyPipeline.from_pretrained(folder).components
    parts["brain_extractor"] = BrainExtractor(block_out_channels=(4,))
    parts["healthy_maps"] = HealthyMapsModel(8, 8)
    AnoDDPMPipeline(**parts, noise_level=7, threshold=0.5, normalization="healthy_maps").save_pretrained(folder)
    return folder


def test_a_run_begins_with_the_weights_of_a_pipeline(train, start, tmp_path):
    # A step of length 0 leaves them and their average as they were.
    run = train(1, init_from=str(start), unet={"block_out_channels": [4]}, optim={"learning_rate": 0.0}, seed=5)
    torch.testing.assert_close(weights(run), weights(start.parent), rtol=0, atol=0)
    options, pipe = (
        yaml.safe_load((run / "config.yaml").read_text()),
        AnomalyPipeline.from_pretrained(run / "pipeline"),
    )
    assert (pipe.scheduler.config.wavelength, pipe.config.noise_level, pipe.config.threshold) == (4.0, 7, None)
    assert pipe.healthy_maps is None and pipe.config.normalization == "none"
    assert pipe.brain_extractor is not None and options["train"]["init_from"] == str(start)
    assert options["unet"]["norm_num_groups"] == 4 and options["scheduler"]["octaves"] == 2
    card = (run / "pipeline/README.md").read_text()
    assert "Begun with the weights of pipeline." in card and str(tmp_path) not in card


def test_hidden_modalities_are_drawn_again_after_a_stop(train, tmp_path):
    two = make_data(tmp_path / "two", modalities=("t1", "t2"))
    given = {"data_path": two, "objective": {"modality_dropout": 0.5}}
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for step in stops:
            loop = {"output_dir": str(tmp_path / name), "resume": "latest" if step > stops[0] else None}
            train(step, **loop, **given)
    weights = [load_file(path) for path in sorted(tmp_path.glob("*/pipeline/unet/*.safetensors"))]
    assert len(weights) == 2 and all(torch.equal(values, weights[1][name]) for name, values in weights[0].items())
    pipe = AnomalyPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    assert pipe.may_lack == ["t1", "t2"]
    # What goes on from it without, may not do without any more.
    start = str(tmp_path / "whole" / "pipeline")
    run = train(1, data_path=two, init_from=start, unet={})
    assert AnomalyPipeline.from_pretrained(run / "pipeline").may_lack == []


def test_a_run_that_began_with_a_pipeline_goes_on_from_its_own_weights(train, start, tmp_path):
    options = {"init_from": str(start), "unet": {}, "optim": {"learning_rate": 1e-2}}
    whole = train(4, **options).rename(tmp_path / "whole")
    train(2, **options)
    run = train(4, resume="latest", **options)
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=0)
    assert (run / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"`train.init_from` was '.*earlier/pipeline', is None"):
        train(5, resume="latest", optim={"learning_rate": 1e-2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": UNET | {"layers_per_block": 2}}, r"`unet.layers_per_block` is 1 there and 2 here\. Leave"),
        ({"unet": {"_class_name": "UNet2DHeadsModel"}}, r"`unet._class_name` is 'UNet2DModel' there"),
        ({"scheduler": {"wavelength": 9.0}}, r"`scheduler.wavelength` is 4.0 there and 9.0 here"),
        ({"processor": {"context": 1}}, r"`processor.context` is 0 there and 1 here"),
        ({"kind": ANDiObjective, "method": "andi"}, r"holds a AnoDDPMPipeline, but the method andi trains a ANDiPip"),
        ({"kind": SADMObjective, "method": "sadm"}, r"`train.init_from` must not be given for the method sadm"),
        ({"init_from": "missing/folder"}, r"missing/folder"),
    ],
)
@pytest.mark.usefixtures("near_hub")  # has no missing/folder either
def test_what_a_run_cannot_begin_with(train, start, tmp_path, changes, message):
    changes = {"init_from": str(start), "unet": {}, **changes}
    if changes.get("method") == "sadm":
        changes["objective"] = {"reconstruction_path": str(start)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(1, **changes)
    assert not (tmp_path / "run").exists()


def test_the_data_of_a_run_are_prepared_as_those_of_its_start(train, start, tmp_path):
    pipe = AnomalyPipeline.from_pretrained(start)
    pipe.processor = VolumeProcessor(modalities=("t1",), size=(8, 8), brain_mask="given")
    pipe.save_pretrained(start)
    with pytest.raises(ValueError, match=r"than the pipeline of `train.init_from` .*: `brain_mask` is "):
        train(1, init_from=str(start), unet={})


# Labels


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("method", "kind", "unet"),
    [
        ("anofpdm", GuidedObjective, UNET),
        ("ddib", DDIBObjective, UNET),
        ("classifier", ClassifierObjective, CLASSIFIER),
    ],
)
def test_methods_that_read_labels(train, data, method, kind, unet, streaming):
    run = train(2, kind, method=method, unet=unet, streaming=streaming, validate_every=1)
    assert steps_of(run) == [1, 1, 2, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("method", "kind", "unet", "label", "message"),
    [
        ("anofpdm", GuidedObjective, UNET, None, "learns from labels, healthy or unhealthy, and 1 of the 2 subjects"),
        ("classifier", ClassifierObjective, CLASSIFIER, None, "the split `train` have none: s01. Prepare the data"),
        ("sadm_labelled", LabelledSADMObjective, {}, None, "masks of all who are not known to be healthy, and 1 of"),
        ("sadm_labelled", LabelledSADMObjective, {}, 1, "masks of all who are not known to be healthy, and 1 of"),
    ],
)
def test_subjects_that_lack_what_is_learnt_from_are_named_before_the_training(
    train, start, tmp_path, method, kind, unet, label, message, streaming
):
    place = make_data(tmp_path / "unlabelled", labels=(0, label, 0))
    objective = {"reconstruction_path": str(start)} if method == "sadm_labelled" else {}
    with pytest.raises(ValueError, match=message):
        train(2, kind, method=method, unet=unet, objective=objective, streaming=streaming, data_path=place)
    assert not (tmp_path / "run" / "checkpoints").exists()


# One run per folder


def test_a_folder_belongs_to_one_run(train, tmp_path):
    with lock_folder(tmp_path / "run"):
        before = tree(tmp_path / "run")
        with pytest.raises(BlockingIOError, match=rf"run is in use by process {os.getpid()} on "):
            train(1)
        assert tree(tmp_path / "run") == before
    run = train(1)
    with lock_folder(run), pytest.raises(BlockingIOError, match="in use by process"):
        train(2, resume="latest")
    assert steps_of(run) == [1]


def test_auto_begins_a_run_and_goes_on_with_it(train, tmp_path):
    run = train(1, resume="auto")
    train(2, resume="auto")
    assert steps_of(run) == [1, 2] and not (run / "set-aside").exists()
    # What is there and cannot be gone on from is no reason to begin anew beside it.
    for checkpoint in list_checkpoints(run):
        (checkpoint / "training.json").write_text("{")
    before = tree(run)
    with pytest.raises(
        FileNotFoundError, match="is auto, but .* no checkpoint that is whole: .*training.json is damaged"
    ):
        train(3, resume="auto")
    assert tree(run) == before


def test_a_mistake_leaves_no_folder(train, tmp_path):
    with pytest.raises(FileNotFoundError, match="`train.resume` is latest, but .* holds no checkpoint"):
        train(1, resume="latest")
    assert not (tmp_path / "run").exists()


# How the network is run


def test_a_compiled_network_trains_goes_on_and_is_exported(train, tmp_path, monkeypatch):
    told, compile_as_is = [], torch.compile

    def compile_quickly(model, backend, **settings):
        told.append(backend)
        return compile_as_is(model, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    optim = {"learning_rate": 0.1}
    train(1, compile=True, optim=optim)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    run = train(2, resume="latest", validate_every=2, optim=optim)
    assert told == ["inductor"] * 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    # It is the same network, with and without: whoever begins compiled may go on otherwise.
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    train(3, resume="latest", optim=optim)
    assert len(told) == 2
    expected = weights(train(3, optim=optim, output_dir=str(tmp_path / "plain")))
    torch.testing.assert_close(weights(run), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(AnomalyPipeline.from_pretrained(run / "pipeline"), AnoDDPMPipeline)


def test_regions_are_not_compiled(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    with pytest.raises(ValueError, match="was told to compile regions: here the whole network is compiled"):
        train(1)


def test_gradient_checkpointing_changes_memory_alone(train, tmp_path, monkeypatch):
    expected = weights(train(2, output_dir=str(tmp_path / "plain")))
    again, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *given, **named: again.append(1) or checkpoint(*given, **named)
    )
    train(1)
    assert not again
    run = train(2, resume="latest", gradient_checkpointing=True)
    assert again
    torch.testing.assert_close(weights(run), expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_gradient_checkpointing(train, tmp_path):
    with pytest.raises(ValueError, match="`train.gradient_checkpointing` must be false for the method anoddpm"):
        train(1, unet={"_class_name": "ANDiUNet2DModel"}, gradient_checkpointing=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("supported", [False, True])
def test_bf16_is_for_processors_that_have_it(monkeypatch, capsys, supported):
    """One clear line, and float32; `accelerate launch` takes whoever wants bf16 all the same at its word."""
    made = []
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: supported)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(loop_files, "Accelerator", lambda **settings: made.append(settings["mixed_precision"]))
    for precision in ("bf16", "fp16", "no", None):
        loop_files._make_accelerator(LoopOptions(mixed_precision=precision))
    assert made == ["bf16" if supported else "no", "fp16", "no", None]
    told = "This CPU has no instructions for `train.mixed_precision` bf16" in capsys.readouterr().out
    assert told is not supported


# Values that are not finite


class Poisoned(NoiseObjective):
    """Spoils something in the third step, after its loss is computed: what a broken memory does."""

    what = "weights"

    def loss(self, model, batch, keys):
        loss = super().loss(model, batch, keys)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            weight = next(iter(self.model.parameters()))
            if self.what == "buffer":
                self.model.register_buffer("spoiled", torch.tensor([torch.inf]))
            else:
                weight.data.view(-1)[0] = torch.nan
        return loss


@pytest.mark.parametrize("what", ["weights", "buffer"])
@pytest.mark.parametrize("log_every", [1, 9])
def test_spoiled_weights_are_never_saved(train, what, log_every):
    spoiled = type("Spoiled", (Poisoned,), {"what": what})
    with pytest.raises(
        FloatingPointError, match=r"(in the weights|The loss is nan) at step 3\. .*step-0000002 was saved"
    ):
        train(3, spoiled, log_every=log_every)


def test_the_last_update_is_checked(train, tmp_path):
    # The loss is that before the update: finite. So are the weights, which would never change again.
    with pytest.raises(
        FloatingPointError, match=r"values in the optimizer's state at step 1\. Nothing was saved yet\. "
    ):
        train(1, optim={"algorithm": "adam", "weight_decay": 1e30})
    assert not (tmp_path / "run" / "pipeline").exists() and not list_checkpoints(tmp_path / "run")
    assert steps_of(tmp_path / "run") == [1]


def test_the_average_and_the_optimizer_are_checked(train):
    run = train(1)
    checkpoint = run / "checkpoints" / "step-0000001"
    for file, spoil, part in (
        ("optimizer.bin", lambda state: state["state"][0]["exp_avg_sq"], "the optimizer's state"),
        ("custom_checkpoint_2.pkl", lambda state: state["shadow_params"][0], "their moving average"),
    ):
        content = (checkpoint / file).read_bytes()
        state = torch.load(checkpoint / file)
        spoil(state).view(-1)[0] = torch.inf
        torch.save(state, checkpoint / file)
        resized = json.loads((checkpoint / RECORD).read_text())
        resized["files"][file] = (checkpoint / file).stat().st_size
        kept = (checkpoint / RECORD).read_bytes()
        (checkpoint / RECORD).write_text(json.dumps(resized))
        with pytest.raises(ValueError, match=f"step-0000001 holds NaN or infinite values in {part}"):
            train(2, resume="latest")
        (checkpoint / file).write_bytes(content)
        (checkpoint / RECORD).write_bytes(kept)
    train(2, resume="latest")


def test_weights_of_a_checkpoint_are_checked(train):
    run = train(1)
    file = run / "checkpoints" / "step-0000001" / "model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="step-0000001 holds NaN or infinite values in the weights"):
        train(2, resume="latest")


@pytest.mark.parametrize("part", ["classifier_path", "encoder_path", "reconstruction_path"])
def test_parts_that_were_trained_before_are_checked(tmp_path, part):
    torch.manual_seed(0)
    processor = VolumeProcessor(modalities=("image",), size=(SIZE, SIZE))
    spoiled = make_pipeline("ClassifierGuidedPipeline" if part == "classifier_path" else "CDDPMPipeline")
    network = {"classifier_path": "classifier", "encoder_path": "encoder", "reconstruction_path": "unet"}[part]
    weight = next(iter(getattr(spoiled, network).parameters()))
    value = weight.data.view(-1)[0].item()

    def load():
        if part == "classifier_path":
            load_classifier(tmp_path, spoiled.scheduler, processor)
        elif part == "encoder_path":
            load_encoder(tmp_path, 1, 6)
        else:
            options = TrainOptions(method="sadm", unet={"block_out_channels": [4, 8]}, objective={part: str(tmp_path)})
            SADMObjective.from_options(options, processor)

    for spoil in (torch.nan, -torch.inf):
        weight.data.view(-1)[0] = spoil
        spoiled.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"`objective.{part}`: the \w+ of .* holds NaN or infinite weights"):
            load()
    weight.data.view(-1)[0] = value
    spoiled.save_pretrained(tmp_path)
    load()


class Overflowing(NoiseObjective):
    def loss(self, model, batch, keys):
        loss = super().loss(model, batch, keys)
        return loss if torch.is_grad_enabled() else loss * torch.inf


def test_a_validation_loss_that_is_not_finite(train, tmp_path):
    with pytest.raises(FloatingPointError, match=r"The validation loss is inf at step 2\. .*step-0000001 was saved"):
        train(2, Overflowing, validate_every=2)
    assert steps_of(tmp_path / "run") == [1, 2] and not (tmp_path / "run" / "pipeline").exists()


# The pipeline folder


def test_what_is_not_of_a_training_stays_in_the_pipeline_folder(train, capsys):
    run = train(1)
    folder = run / "pipeline"
    card = (folder / "README.md").read_text()
    train(2, resume="latest")
    # A card that nobody has changed is made anew.
    assert "Trained to step 1 " in card and "Trained to step 2 " in (folder / "README.md").read_text()
    assert "they stay" not in capsys.readouterr().out and not (run / "set-aside").exists()
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "README.md").write_text(card + "\nThanks to all.\n")
    train(3, resume="latest")
    assert (folder / "notes" / "mine.txt").read_text() == "mine"
    assert (folder / "README.md").read_text() == card + "\nThanks to all.\n"
    assert "notes/mine.txt, README.md in " in capsys.readouterr().out and not (run / "set-aside").exists()
    train(4, resume="latest")
    assert (folder / "README.md").read_text() == card + "\nThanks to all.\n"


def test_a_changed_pipeline_is_set_aside(train, capsys):
    run = train(1)
    folder = run / "pipeline"
    index = json.loads((folder / "model_index.json").read_text()) | {"threshold": 0.25}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("with a threshold")
    before = tree(folder)
    train(2, resume="latest")
    assert f"model_index.json in {folder} were changed" in capsys.readouterr().out
    assert tree(run / "set-aside" / "before-step-0000002" / "pipeline") == before
    assert AnomalyPipeline.from_pretrained(folder).config.threshold is None
    assert "Trained to step 2 " in (folder / "README.md").read_text()


@pytest.mark.parametrize("place", ["writing", "swapping"])
def test_a_stop_while_exporting_leaves_the_earlier_pipeline(train, monkeypatch, place):
    run = train(1)
    before = tree(run / "pipeline")

    def stop(*_):
        raise Stopped(15)

    rename = Path.rename

    def stop_in_the_middle(path, target):
        return stop() if path.name == ".partial.pipeline" else rename(path, target)

    with monkeypatch.context() as patch:
        if place == "writing":
            patch.setattr(export_files, "complete_folder", stop)
        else:
            patch.setattr(Path, "rename", stop_in_the_middle)
        with pytest.raises(Stopped):
            train(2, resume="latest")
    if place == "writing":
        assert tree(run / "pipeline") == before
    export_files.restore_pipeline(run)
    assert tree(run / "pipeline") == before
    train(2, resume="latest")
    assert "Trained to step 2 " in (run / "pipeline" / "README.md").read_text()
    assert not [name for name in names(run) if name.startswith((".partial.", ".old."))]


def test_the_card_of_a_push(train):
    folder = train(1) / "pipeline"
    own = (folder / "README.md").read_text()
    choose = export_files.choose_card(folder)
    assert choose(None) == own and choose(own) == own
    earlier = own.replace("Trained to step 1 ", "Trained to step 9 ")
    assert choose(earlier) == earlier  # changed by hand: the seal does not fit
    theirs = "---\nlicense: mit\n---\n# Ours\n"
    assert choose(theirs) == theirs
    # That of an earlier checkpoint, as the training wrote it, is replaced.
    text = earlier[: earlier.rindex("<!--")].rstrip()
    assert choose(export_files.seal(text)) == own


# What is published


def test_nothing_of_this_machine_is_published(train, tmp_path, data):
    picture = tmp_path / "Müller 1960.png"
    text = PngInfo()
    text.add_text("Comment", f"{tmp_path} patient Mustermann")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "patient Mustermann"  # turned by a quarter
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    Image.fromarray(pixels).save(picture, pnginfo=text, exif=exif)

    part = train(1, ClassifierObjective, method="classifier", unet=CLASSIFIER, output_dir=str(tmp_path / "part"))
    run = train(
        1,
        LearnedSigmaObjective,
        method="learned_sigma",
        objective={"classifier_path": str(part / "pipeline")},
        inference={"noise_level": 3},
        hub_picture=str(picture),
        output_dir=str(tmp_path / "run"),
    )
    home, private = str(Path.home()), (str(tmp_path), str(data.parent), "Mustermann", "Müller", "M\\xFCller")
    for folder in (part / "pipeline", run / "pipeline"):
        for path in folder.rglob("*"):
            content = path.read_bytes().decode("latin-1") if path.is_file() else ""
            assert not [word for word in private if word.encode().decode("latin-1") in content], path
            assert home == "/" or home not in content, path
    with Image.open(run / "pipeline" / "example.png") as published:
        assert published.info == {} and np.array_equal(np.array(published), np.rot90(pixels, -1))
    config = yaml.safe_load((run / "pipeline" / "config.yaml").read_text())
    assert config["data"]["path"] == "set" and config["objective"]["classifier_path"] == "pipeline"
    assert config["train"]["hub_picture"] is None and config["train"]["output_dir"] == "run"


def test_a_picture_is_looked_at_before_the_training(train, tmp_path):
    with pytest.raises(FileNotFoundError, match="`train.hub_picture`: there is no file"):
        train(1, hub_picture=str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="`train.hub_picture`: .*text.png is no picture"):
        train(1, hub_picture=str(tmp_path / "text.png"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_of_the_optimizer(train, name, value):
    with pytest.raises(ValueError, match=f"`optim.{name}` must be a finite number and at least 0"):
        train(1, optim={name: value})


def test_text_is_utf_8(train, tmp_path):
    run = train(1, output_dir=str(tmp_path / "Übung"))
    assert "Übung" in (run / "config.yaml").read_bytes().decode("utf-8")
    assert "Übung" in (run / "pipeline" / "config.yaml").read_bytes().decode("utf-8")
