"""What a benchmark plans: which methods a data set allows, why not the others, and their configurations."""

import dataclasses
import importlib

import pytest
from accelerate import init_empty_weights

from anodiff import VolumeProcessor
from anodiff.benchmark import read_duration
from anodiff.configs import parse_options
from anodiff.ranking.plan import METHODS, RANKED, Counts, Entry, Facts, find_obstacle, make_configuration, make_plan
from anodiff.ranking.table import print_plan, rank
from anodiff.train import OBJECTIVES
from anodiff.training.options import TrainOptions


ALL = Counts(healthy=30, anomalous=10, annotations=1)


def make_facts(size=(64, 64), train: Counts | None = ALL, **processor) -> Facts:
    settings = VolumeProcessor(modalities=("flair",), size=size, **processor).settings()
    splits = {"test": ALL} if train is None else {"train": train, "test": ALL}
    return Facts(settings, splits)


def plan(facts, methods=("all",), given=None, shipped=None) -> dict[str, Entry]:
    return {entry.name: entry for entry in make_plan(facts, methods, given or {}, shipped or {})}


def test_all_methods_and_their_parts_first():
    entries = plan(make_facts())
    assert set(entries) == {*METHODS, "cimd"}
    assert [name for name, entry in entries.items() if entry.kind == "part"] == ["spark", "classifier"]
    assert {name for name, entry in entries.items() if entry.reason} == {"cimd"}
    order = list(entries)
    for name, method in METHODS.items():
        assert method.part is None or order.index(method.part[0]) < order.index(name)


def test_named_methods_bring_their_parts_and_the_autoencoder():
    entries = plan(make_facts(), ["sadm"])
    assert list(entries) == ["dae", "spark", "cddpm", "sadm"]
    # cDDPM is a part of SADM, and a method: it costs nothing more to rank it.
    assert [entry.kind for entry in entries.values()] == ["training", "part", "training", "training"]


@pytest.mark.parametrize(
    ("facts", "name", "reason"),
    [
        (make_facts(train=None), "anoddpm", "there is no split `train`"),
        (make_facts(size=None), "andi", "the slices have no common size"),
        (make_facts(train=Counts(anomalous=5)), "dae", "holds no healthy slice"),
        (make_facts(train=Counts(healthy=5)), "anofpdm", "holds no anomalous slice: prepare it with"),
        (make_facts(train=Counts(anomalous=5)), "ddib", "holds no healthy slice"),
        (make_facts(train=Counts(5, 5, unknown=3)), "anofpdm", "3 slices of the split `train` have no known label"),
        (make_facts(train=Counts(5, 5, unannotated=4)), "sadm_labelled", "4 anomalous slices .* have no mask"),
        (make_facts(value_range=(0.0, 1.0)), "autoddpm", r"it needs slices in \[-1, 1\], and these are in \[0, 1\]"),
        (make_facts(value_range=(0.0, 1.0)), "learned_sigma", r"it needs slices in \[-1, 1\]"),
        (make_facts(intensity="mean_std"), "dae", "`intensity` mean_std"),
        (make_facts(size=(66, 64)), "anoddpm", "sides divisible by 4, and slices have 66 x 64 pixels"),
        (make_facts(size=(72, 64)), "cddpm", "it needs spark: its network needs sides divisible by 16"),
        (make_facts(size=(72, 64)), "sadm", "it needs cddpm: it needs spark: its network"),
        (make_facts(), "cimd", "it learns from several annotations of every slice, and there are none"),
        (make_facts(train=Counts(5, 5, annotations=4)), "cimd", "several segmentations, which have no anomaly map"),
    ],
)
def test_why_a_method_is_not_attempted(facts, name, reason):
    import re

    assert re.search(reason, find_obstacle(name, facts))
    entry = plan(facts, [name])[name]
    assert entry.reason == find_obstacle(name, facts)
    assert f"{name}" in (text := print_plan([entry], 60.0, facts)) and entry.reason in text


def test_what_learns_from_healthy_slices_takes_unknown_ones():
    assert find_obstacle("anoddpm", make_facts(train=Counts(unknown=5))) is None


def test_a_method_with_a_model_is_not_trained_unless_it_is_named_or_a_part():
    given = {"mine-12345678": ("owner/mine", "CDDPMPipeline", None)}
    entries = plan(make_facts(), ["all"], given)
    assert entries["ddpm_2d"].reason == "the model mine-12345678 is of this method"
    assert entries["cddpm"].reason is None  # SADM needs one
    assert entries["mine-12345678"].kind == "given" and entries["mine-12345678"].source == "owner/mine"
    assert plan(make_facts(), ["ddpm_2d"], given)["ddpm_2d"].reason is None


@pytest.mark.parametrize("size", [(64, 64), (96, 80), (192, 160)])
@pytest.mark.parametrize("name", METHODS)
def test_configurations_build_at_the_size_of_the_data(name, size, tmp_path):
    """Networks, schedulers and inference values for the grid and two modalities; parts that are trained first are not
    there, and that is all that is missing."""
    import yaml

    settings = VolumeProcessor(modalities=("flair", "t1"), size=size).settings()
    facts = Facts(settings, {"train": ALL})
    assert find_obstacle(name, facts) is None
    config = make_configuration(name, facts, "prepared/x", {part: f"none/{part}/pipeline" for part in METHODS})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    options = parse_options(TrainOptions, ["--config", str(tmp_path / "own.yaml")], prog="", description="")
    module, kind = OBJECTIVES[options.method]
    objective_class = getattr(importlib.import_module(module), kind)
    processor = VolumeProcessor.from_dict(settings)
    with init_empty_weights():
        if METHODS[name].part is None:
            assert objective_class.from_options(options, processor).model is not None
        else:
            assert objective_class.make_network(options, processor) is not None
            with pytest.raises(OSError, match="none/"):
                objective_class.from_options(options, processor)


def test_lengths_grow_with_the_slices():
    config = make_configuration("anoddpm", make_facts((192, 160)), "x", {})
    assert config["scheduler"]["wavelength"] == 48.0  # a quarter of the side, as 16 of 64
    assert config["unet"]["block_out_channels"] == [32, 32, 64, 96]
    assert config["unet"]["up_block_types"] == ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"]
    assert make_configuration("classifier", make_facts((192, 160)), "x", {})["unet"]["attention_levels"] == [3]
    patches = make_configuration("pddpm", make_facts((96, 80)), "x", {})["inference"]
    assert (patches["patch_size"], patches["overlap"]) == (48, "average")
    assert make_configuration("pddpm", make_facts(), "x", {})["inference"]["overlap"] == "none"


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("0.5h", 1800)]
)
def test_durations(text, seconds):
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "0h", "2 hours", "-1h"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="`budget` must be a time above 0 such as 2h"):
        read_duration(text)


def row(name, value, kind="pipeline", **others):
    return {"name": name, "kind": kind, "metrics": {"voxel_average_precision": value}, **others}


def test_ranking():
    """By AP, each row with its difference from the next one in that order, whichever of them the report names first."""
    results = [
        row("ANDi (andi)", 0.3, training_population="mine"),
        row("DAE (dae)", 0.5, training_population="mine"),
        row("intensity of flair", 0.4, "baseline"),
        row("brain area", None, "statistic"),
    ]
    first = {"metric": "voxel_average_precision", "rows": [1, 2], "difference": 0.1, "low": 0.02, "high": 0.2}
    second = {"metric": "voxel_average_precision", "rows": [0, 2], "difference": -0.1, "low": -0.3, "high": 0.1}
    comparisons = [first | {"p": 0.01, "p_holm": 0.02}, second | {"p": 0.2, "p_holm": 0.4}]
    entries = [Entry("dae", "training", ""), Entry("andi", "training", ""), Entry("cimd", "training", "", "no masks")]
    states = {
        "dae": {"state": "trained", "seconds": 30.0, "steps": 7},
        "andi": {"state": "trained", "seconds": 31.0, "steps": 8},
        "ddib": {"state": "failed", "reason": "it diverged"},
    }
    ranking = rank({"results": results, "comparisons": comparisons}, ["andi", "dae"], entries, states)
    assert [one["name"] for one in ranking["rows"]] == ["DAE (dae)", "intensity of flair", "ANDi (andi)"]
    assert [one["training_seconds"] for one in ranking["rows"]] == [30.0, None, 31.0]
    assert [one["origin"] for one in ranking["rows"]] == ["trained here", "baseline", "trained here"]
    best, middle, last = (one["next"] for one in ranking["rows"])
    assert best["difference"] == 0.1 and best["significant"] and last is None
    assert (middle["difference"], middle["low"], middle["high"], middle["significant"]) == (0.1, -0.1, 0.3, False)
    assert ranking["absent"] == {"cimd": "no masks", "ddib": "it diverged", "brain area": "it has no AP (voxels)"}


def test_without_masks_slices_decide():
    results = [{"name": "a", "kind": "pipeline", "metrics": {"voxel_average_precision": None, "slice_auroc": 0.6}}]
    assert rank({"results": results}, ["a"], [Entry("a", "given", "a")], {})["metric"] == "slice_auroc"
    with pytest.raises(ValueError, match="nothing to rank by"):
        rank({"results": [row("a", None)]}, ["a"], [], {})


def test_the_names_are_those_of_train():
    assert {*METHODS, "cimd"} <= set(OBJECTIVES) and set(RANKED) == {*METHODS, "cimd"} - {"spark", "classifier"}
    assert dataclasses.is_dataclass(METHODS["dae"])
