"""`train.py` as a person runs it: real `accelerate launch`, real files."""

import json
import os
import signal
import time

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from anodiff import AnoDDPMPipeline, AnomalyPipeline


STEADY = ["--optim.lr_scheduler", "constant", "--optim.warmup_steps", 0]


def log(workplace, run: str) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {}
    for line in (workplace.folder / run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            values.setdefault(name, {})[entry["step"]] = value
    return values


def weights(workplace, run: str) -> dict[str, torch.Tensor]:
    return load_file(workplace.folder / run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_losses(workplace, actual: str, expected: str, tolerance: float = 1e-5):
    for name in ("loss", "validation_loss", "lr"):
        one, other = log(workplace, actual)[name], log(workplace, expected)[name]
        assert one.keys() == other.keys()
        for step in one:
            assert one[step] == pytest.approx(other[step], rel=tolerance, abs=tolerance), (name, step)


def test_a_run_leaves_a_complete_pipeline(workplace, trained):
    run = workplace.folder / trained
    folder = run / "pipeline"
    pipe = AnomalyPipeline.from_pretrained(folder)
    assert type(pipe) is AnoDDPMPipeline
    assert pipe.config.noise_level == 3 and pipe.config.threshold == 0.2
    assert pipe.scheduler.config.wavelength == 8.0
    assert pipe.unet.config.in_channels == 2 and pipe.unet.config.sample_size == 16
    assert list(pipe.processor.config.modalities) == ["flair", "t1"]
    raw = workplace.folder / "raw" / "test_1"
    pipe.set_progress_bar_config(disable=True)
    result = pipe({name: raw / f"{name}.nii.gz" for name in ("t1", "flair", "brain")})
    assert result.anomaly_map.shape == nib.load(raw / "flair.nii.gz").shape and result.pred_mask is not None

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["max_steps"] == 4 and config["optim"]["max_grad_norm"] == 1.0
    card = (folder / "README.md").read_text()
    assert "not a medical device" in card and "AnoDDPM" in card and "healthy_by_label" in card
    # Nothing of this machine travels with the weights.
    for path in folder.rglob("*"):
        assert path.suffix == ".safetensors" or path.is_dir() or str(workplace.folder) not in path.read_text()
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["slices"]["train"] == "healthy_by_label"
    assert (folder / "pipeline.py").read_text().startswith("from anodiff import AnoDDPMPipeline")
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert list((run / "logs").glob("events*"))
    assert sorted(log(workplace, trained)["loss"]) == [1, 2, 3, 4]
    # Warm-up for one step, then a cosine to zero, counted in optimizer steps.
    rates = log(workplace, trained)["lr"]
    assert rates[1] == pytest.approx(1e-3) and rates[4] == pytest.approx(0, abs=1e-9) and rates[2] > rates[3]


def test_interrupted_equals_uninterrupted(workplace, trained):
    options = ["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", "resumed"]
    # The schedule is that of the whole run; the first part ends after two steps.
    workplace.run("train", *options, "--train.max_steps", 2, "--optim.lr_total_steps", 4)
    again = workplace.run("train", *options, check=False)
    assert again.returncode != 0 and "--train.resume latest" in again.stderr
    workplace.run("train", *options, "--train.resume", "latest")
    assert_same_losses(workplace, "resumed", trained, tolerance=0)
    expected = weights(workplace, trained)
    for name, tensor in weights(workplace, "resumed").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_two_processes_equal_one_with_resume_in_the_middle(workplace, trained):
    options = ["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", "two", "--train.batch_size", 2]
    workplace.run("train", *options, "--train.max_steps", 2, "--optim.lr_total_steps", 4, processes=2)
    workplace.run("train", *options, "--train.resume", "latest", processes=2)
    assert_same_losses(workplace, "two", trained)


def test_accumulation_equals_a_large_batch(workplace, trained):
    workplace.run(
        "train",
        *["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", "accumulated"],
        *["--train.batch_size", 1, "--train.gradient_accumulation_steps", 4, "--train.report_to", "none"],
    )
    assert_same_losses(workplace, "accumulated", trained)
    assert not (workplace.folder / "accumulated" / "logs").exists()


def test_another_division_of_the_same_batch_can_resume(workplace, trained):
    options = ["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", "divided"]
    # One step, so that accelerate's own count of forward passes would be out of step with the new division.
    first = ["--train.max_steps", 1, "--optim.lr_total_steps", 4]
    workplace.run("train", *options, *first)
    again = ["--train.resume", "latest", "--train.batch_size", 1, "--train.gradient_accumulation_steps", 4]
    done = workplace.run("train", *options, *again)
    assert "Resumed from" in done.stdout
    losses = log(workplace, "divided")["loss"]
    for step, value in log(workplace, trained)["loss"].items():
        assert losses[step] == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_dropout_is_resumed_exactly_and_the_log_has_every_step_once(workplace):
    options = ["--config", "tiny.yaml", "--data", "prepared", "--unet.dropout", 0.5, "--train.validate_every", 0]
    options += ["--train.report_to", "none"]
    workplace.run("train", *options, "--train.output_dir", "dropout")
    part = ["--train.output_dir", "dropout_part"]
    workplace.run("train", *options, *part, "--train.max_steps", 3, "--optim.lr_total_steps", 4)
    # As if the run had died in step 4, after its checkpoint of step 2.
    middle = str(workplace.folder / "dropout_part" / "checkpoints" / "step-0000002")
    workplace.run("train", *options, *part, "--train.resume", middle)
    lines = (workplace.folder / "dropout_part" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert log(workplace, "dropout_part")["loss"] == log(workplace, "dropout")["loss"]


def test_a_broken_loss_is_never_saved(workplace):
    done = workplace.run(
        "train",
        *["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", "nan", "--train.checkpoint_every", 1],
        *["--train.log_every", 100, "--optim.learning_rate", "1e30", *STEADY],
        *["--train.validate_every", 0, "--optim.max_grad_norm", 0, "--train.report_to", "none"],
        check=False,
    )
    assert done.returncode != 0 and "The loss is nan" in done.stderr
    (saved,) = (workplace.folder / "nan" / "checkpoints").iterdir()
    assert saved.name == "step-0000001"


def test_another_global_batch_cannot_resume(workplace, trained):
    done = workplace.run(
        "train",
        *["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", trained],
        *["--train.resume", "latest", "--train.batch_size", 3],
        check=False,
    )
    assert done.returncode != 0 and "4 samples per step, this run has 3" in done.stderr


def test_checkpoint_limit_and_ema(workplace, trained):
    names = sorted(path.name for path in (workplace.folder / trained / "checkpoints").iterdir())
    assert names == ["step-0000002", "step-0000004"]
    raw = load_file(workplace.folder / trained / "checkpoints" / names[-1] / "model.safetensors")
    saved = weights(workplace, trained)
    moved = [not torch.equal(saved[name], raw[name]) for name in saved]
    assert np.mean(moved) > 0.9  # what is exported is the average, not the last weights


ENDLESS = [
    *["--config", "tiny.yaml", "--data", "prepared", "--data.num_workers", 1, "--train.max_steps", 100_000],
    *[*STEADY, "--train.validate_every", 0, "--train.checkpoint_every", 1],
    *["--train.report_to", "none"],
]


def start_training(workplace, name, **how):
    """Begins a training that does not end by itself; gives it, and all processes below it, once it has taken steps."""
    begun = workplace.start("train", *ENDLESS, "--train.output_dir", name, **how)
    checkpoint = workplace.folder / name / "checkpoints" / "step-0000003"
    while not checkpoint.exists():
        assert begun.poll() is None, begun.communicate()[1]
        time.sleep(0.05)
    return begun, psutil.Process(begun.pid).children(recursive=True)


def test_a_training_ends_with_its_launcher_and_holds_its_folder_until_then(workplace):
    begun, below = start_training(workplace, "left", processes=1)
    assert len(below) == 2  # the training and its reader of slices
    again = workplace.run("train", *ENDLESS, "--train.output_dir", "left", "--train.resume", "latest", check=False)
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert again.stderr.splitlines()[-1].startswith("error: left is in use by process ")
    begun.kill()
    _, error = begun.communicate()  # until the last process below it has closed the pipe
    assert not psutil.wait_procs(below, timeout=10)[1]
    assert "The launcher of this process is gone: it ends, too." in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("stopped by SIGTERM: ")
    reached = max(log(workplace, "left")["loss"])
    workplace.run(
        "train", *ENDLESS, "--train.output_dir", "left", "--train.resume", "latest", "--train.max_steps", reached + 1
    )
    assert sorted(log(workplace, "left")["loss"]) == list(range(1, reached + 2))


def test_an_interrupt_ends_a_training_with_one_line(workplace):
    begun, below = start_training(workplace, "interrupted")
    os.killpg(begun.pid, signal.SIGINT)  # as Ctrl-C in a terminal, which every process gets
    _, error = begun.communicate()
    assert begun.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("stopped by SIGINT: ") and "`--train.resume latest`" in error
    assert len(below) == 1 and not psutil.wait_procs(below, timeout=10)[1]
