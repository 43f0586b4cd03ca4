"""Help, configurations and the console command."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from anodiff.__main__ import COMMANDS, main
from anodiff.configs import parse_options
from anodiff.train import main as train
from anodiff.training.options import TrainOptions


ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "preprocess",
    "train",
    "eval",
    "benchmark",
    "predict",
    "bids",
    "convert",
    "list_models",
    "ship",
    "publish",
    "app",
    "explore",
    "export",
)


def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], text=True, capture_output=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_wait_for_torch(script):
    start = time.perf_counter()
    done = python("-X", "importtime", ROOT / f"{script}.py", "--help")
    assert done.returncode == 0 and "usage:" in done.stdout
    assert "research" in done.stdout.lower() or "--" in done.stdout
    for heavy in ("torch", "diffusers", "datasets", "transformers", "scipy"):
        assert f"| {heavy}\n" not in done.stderr.replace("|   ", "| "), heavy
    assert time.perf_counter() - start < 10  # a loaded machine; what takes long is named above


def test_console_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(script in said for script in ("preprocess", "app", "explore"))
    assert main([]) == 2 and "a command is missing" in capsys.readouterr().err
    assert main(["dance"]) == 2 and "unknown command 'dance'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "--help"])
    assert stopped.value.code == 0 and "usage: predict.py" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["models", "--help"])
    assert "usage: models" in capsys.readouterr().out


def test_a_shell_completes_commands_options_and_files(tmp_path):
    """In a real bash, by a script that was made without torch."""
    made = python("-X", "importtime", "-m", "anodiff", "completion", "bash")
    assert made.returncode == 0 and not re.search(r"\| +(torch|numpy)\n", made.stderr)
    (tmp_path / "scan of one.nii.gz").touch()
    ask = """
        complete_line() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_anodiff; (IFS=,; echo "${COMPREPLY[*]}"); }
        complete_line anodiff p
        complete_line anodiff predict --sk
        complete_line anodiff predict --fast sc
        complete_line anodiff train --train.max
        complete_line anodiff train --config sc
        complete_line anodiff completion b
        complete -p anodiff
    """
    done = subprocess.run(["bash"], input=made.stdout + ask, cwd=tmp_path, text=True, capture_output=True)
    *lines, registered = done.stdout.splitlines()
    assert registered.endswith("-F _shtab_anodiff anodiff")
    scan = "scan of one.nii.gz"
    assert lines == ["preprocess,predict", "--skip_existing", scan, "--train.max_steps", scan, "bash"]


def test_every_command_is_completed_in_other_shells(capsys):
    assert main(["completion", "zsh"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("#compdef anodiff") and all(f"    {name}:'{COMMANDS[name]}'" in said for name in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "dash"])
    assert stopped.value.code == 2 and "'dash' (choose from 'bash', 'zsh', 'fish', 'tcsh')" in capsys.readouterr().err


def options(*arguments) -> TrainOptions:
    return parse_options(
        TrainOptions, list(arguments), prog="train.py", description="", default_config="anoddpm_phantom.yaml"
    )


def test_flags_win_over_the_file_whatever_their_order(tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {learning_rate: 0.5, warmup_steps: 3}\nunet: {layers_per_block: 2}")
    for arguments in (
        ["--config", str(tmp_path / "run.yaml"), "--optim.learning_rate", "7", "--unet.sample_size", "32"],
        ["--optim.learning_rate", "7", "--unet.sample_size", "32", "--config", str(tmp_path / "run.yaml")],
        ["--optim.learning_rate", "7", "--unet.sample_size", "32", f"--config={tmp_path / 'run.yaml'}"],
    ):
        parsed = options(*arguments)
        assert parsed.optim.learning_rate == 7 and parsed.optim.warmup_steps == 3
        assert parsed.unet == {"layers_per_block": 2, "sample_size": 32}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train:\n\tmax_steps: 4\n", "run.yaml, line 2: .*indented by spaces, and there is a tab"),
        (b"train: {max_steps: 4\n", "run.yaml, line 2: the file is no YAML: expected"),
        (b"a: 1\nb: 2\na: 3\n", "run.yaml, line 3: the file is no YAML: `a` is there twice"),
        (b"train:\n  seed: 1\n  seed: 2\n", "run.yaml, line 3: the file is no YAML: `seed` is there twice"),
        (b"# gr\xfc\xdfe\n", "run.yaml, line 1: byte 0xfc is not UTF-8"),
        (b"", "run.yaml must hold `key: value` pairs, got 'None'"),
        (b"- a\n", r"run.yaml must hold `key: value` pairs, got \"\['a'\]\""),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        options("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.max_steps", "x"], "error: `train.max_steps`: Expected a <class 'int'>. Got value: x"),
        (["--nope", "3"], "error: unrecognized arguments: --nope 3"),
        (["--train.nope", "3"], "error: .*nope"),
    ],
)
def test_wrong_flags_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        options(*arguments)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and re.match(message, said[0])


def test_configurations_are_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "run.yaml").write_bytes("train: {output_dir: gr\xfc\xdfe}".encode())
    script = (
        "from anodiff.configs import parse_options; from anodiff.training.options import TrainOptions;"
        "options = parse_options(TrainOptions, ['--config', 'run.yaml'], prog='', description='');"
        "assert options.train.output_dir == 'gr\\xfc\\xdfe', options.train.output_dir"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("content", ["optimizer: {lr: 1}", "optim: {lr: 1}", "train: {ema: {deccay: 1}}"])
def test_unknown_keys_are_errors(tmp_path, capsys, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        options("--config", str(tmp_path / "run.yaml"))
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processor.size", "[8, 8]"], "`size` is"),
        (["--unet.in_channels", "3"], "`unet.in_channels` must be 2"),
        (["--inference.noise_level", "2000"], "`noise_level` must be an integer between 1 and 1000"),
    ],
)
def test_what_does_not_fit_the_data_is_found_before_the_training(workplace, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(workplace.folder)
    with pytest.raises(ValueError, match=message):
        train(["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", str(tmp_path), *arguments])
    assert not (tmp_path / "pipeline").exists()


def test_packaged_names():
    assert options().data.path == "phantom-mini" and options().unet["layers_per_block"] == 1
    assert options("--config", "anoddpm_nfbs.yaml").unet["num_attention_heads"] == 2
    with pytest.raises(FileNotFoundError, match="comes with .*anoddpm_nfbs.yaml"):
        options("--config", "nothing.yaml")


@pytest.mark.parametrize("name", ["anoddpm_nfbs", "brain_damage"])
def test_named_configurations_resolve_and_run_two_steps(name, tmp_path, monkeypatch):
    """The authors' network in every respect but its width (8 channels in groups of 4); pictures of the named size stand in for
    the data, and a step sees one of them."""
    import numpy as np
    import PIL.Image

    from anodiff.preprocess import main as preprocess

    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    height, width = config["processor"]["size"]
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for number in range(2):
            path = tmp_path / "raw" / split / "healthy" / f"{split}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(rng.integers(1, 255, (height, width), dtype=np.uint8)).save(path)
    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / f"{name}.yaml").read_text())
    recipe |= {"reader": "image_folders", "reader_options": {"healthy": ["healthy"]}, "slices": {}, "split": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert preprocess(["--recipe", "recipe.yaml", "--root", "raw", "--out", "prepared"]) == 0
    narrow = ["--unet.block_out_channels", str([8] * len(config["unet"]["block_out_channels"]))]
    narrow += ["--unet.norm_num_groups", "4"]
    limits = ["--train.max_steps", "2", "--train.batch_size", "1", "--train.validate_every", "0"]
    where = ["--data", "prepared", "--train.output_dir", "run", "--train.report_to", "none"]
    assert train(["--config", f"{name}.yaml", *narrow, *limits, *where]) == 0

    from anodiff import AnomalyPipeline

    pipe = AnomalyPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    for key, value in config["inference"].items():
        assert pipe.config[key] == value
    for key, value in config["scheduler"].items():
        assert pipe.scheduler.config[key] == value


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_builds_what_it_names(path):
    """Networks, schedulers and pipelines as configured, with the processor of the recipe that the file names; weights stay unmade."""
    import importlib

    from accelerate import init_empty_weights

    from anodiff import VolumeProcessor
    from anodiff.data.prepare import read_recipe
    from anodiff.train import OBJECTIVES
    from anodiff.training.optimization import check_optim

    parsed = options("--config", str(path))
    recipe = re.search(r"--recipe (\w+)", path.read_text())
    settings = read_recipe(recipe[1] if recipe else "phantom_mini")["processor"]
    # A file that names no recipe is for the phantom, or says itself what slices it needs.
    processor = VolumeProcessor.from_dict(settings if recipe else settings | parsed.processor)
    processor.check_equal(parsed.processor, "the recipe")
    check_optim(parsed.optim, parsed.train.max_steps)
    module, name = OBJECTIVES[parsed.method]
    objective_class = getattr(importlib.import_module(module), name)
    part = next((value for key, value in parsed.objective.items() if key.endswith("_path")), None)
    if part is not None:
        # A part that is trained first.
        with pytest.raises(OSError, match=part):
            objective_class.from_options(parsed, processor)
        return
    if objective_class.draws_volumes:
        # The label maps are the user's.
        with pytest.raises(FileNotFoundError, match="label_maps"):
            objective_class.from_options(parsed, processor)
        with init_empty_weights():
            network = objective_class.make_network(parsed, processor)
        assert sum(parameter.numel() for parameter in network.parameters()) > 1e5
        return
    with init_empty_weights():
        objective = objective_class.from_options(parsed, processor)
    assert sum(parameter.numel() for parameter in objective.model.parameters()) > 1e5


def test_switches_stand_alone_or_take_a_value():
    from anodiff.predict import PredictOptions

    def overwrite(*arguments):
        return parse_options(PredictOptions, list(arguments), prog="", description="", positional="scans").overwrite

    assert overwrite("--overwrite") and overwrite("--overwrite", "--seed", "1") and overwrite("--overwrite", "true")
    assert overwrite("--overwrite=true") and not overwrite("--overwrite", "false") and not overwrite("a.nii")


def test_flags_of_lists_take_all_that_follows():
    from anodiff.cohorts.options import BidsOptions

    def parsed(*arguments):
        lists = ("participant_label", "run_label")
        return parse_options(BidsOptions, list(arguments), prog="", description="", positional="places", lists=lists)

    options = parsed("in", "out", "group", "--participant_label", "01", "1e3", "--fast", "--run_label=1", "2")
    assert options.places == ["in", "out", "group"] and options.participant_label == ["01", "1e3"]
    assert options.run_label == ["1", "2"] and options.fast
    assert parsed("in").participant_label == []
