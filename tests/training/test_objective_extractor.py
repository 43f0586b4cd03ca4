"""The training objective of the brain extractor, and the heads that it draws."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from anodiff import BrainExtractor
from anodiff.data.phantoms.label_maps import TISSUES, read_label_maps, split_maps
from anodiff.schedulers.draws import make_keys
from anodiff.train import main
from anodiff.training.head_volumes import draw_heads, find_brains
from anodiff.training.objective_extractor import extraction_loss


SIZE, SPACING = (16, 16, 16), 14.0


def label_map(scale: float) -> nib.Nifti1Image:
    """A ball of white matter in fluid in skin, and a nose."""
    shape, spacing = (44, 52, 46), 5.0
    places = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * spacing for n in shape], indexing="ij"), -1)
    distance = np.linalg.norm(places / scale, axis=-1)
    labels = np.zeros(shape, np.int16)
    labels[distance < 90], labels[distance < 75], labels[distance < 65] = 511, 24, 2
    labels[(np.linalg.norm(places - (0, 105, 0), axis=-1) < 25) & (labels == 0)] = 511
    return nib.Nifti1Image(labels, np.diag([spacing, spacing, spacing, 1.0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label_maps")
    for number, scale in enumerate((0.9, 0.95, 1.0)):
        nib.save(label_map(scale), folder / f"{number}.nii.gz")
    return folder


def draw(maps, numbers, seed=0):
    keys = make_keys(seed, numbers, 0)
    return draw_heads(maps, torch.tensor(numbers) % len(maps), keys, SIZE, SPACING)


def test_a_head_is_the_same_alone_and_in_a_batch(folder):
    maps = read_label_maps(folder)
    volumes, brains = draw(maps, list(range(6)))
    for number in range(6):
        volume, brain = draw(maps, [number])
        torch.testing.assert_close(volume[0], volumes[number], rtol=0, atol=1e-4)
        torch.testing.assert_close(brain[0], brains[number])
    assert (draw(maps, [0], seed=1)[0] - volumes[:1]).abs().max() > 0.1


def test_heads_lie_as_scans_do(folder):
    """Axes run to the right, to the front and up: the nose is in front, and brains are brighter than the air."""
    volumes, brains = draw(read_label_maps(folder), list(range(24)))
    assert volumes.shape == brains.shape == (24, 1, *SIZE) and set(brains.unique().tolist()) == {0.0, 1.0}
    middle = volumes.mean((0, 1))[6:10, :, 6:11]
    assert middle[:, -2:].mean() > 1.5 * middle[:, :2].mean()
    # The middle of a volume lies below that of the brain, so that there is room for a neck.
    heights = (brains.sum((1, 2, 3)) * torch.arange(SIZE[2])).sum(1) / brains.sum((1, 2, 3, 4)).clamp(min=1)
    assert heights.mean() > (SIZE[2] - 1) / 2
    inside = (volumes * brains).sum((1, 2, 3, 4)) / brains.sum((1, 2, 3, 4)).clamp(min=1)
    outside = volumes[:, :, 0, 0, 0].mean(1)
    assert (inside > outside).float().mean() > 0.9


def test_brains_are_closed_over_sulci_and_not_over_bone():
    tissues = torch.zeros(1, 24, 24, 24, dtype=torch.uint8)
    tissues[:, 6:18, 6:18, 6:18] = TISSUES.index("cortex")
    tissues[:, 11:13, 6:18, 14:18] = TISSUES.index("outer_fluid")  # a sulcus
    tissues[:, 6:8, 6:8, 6:18] = TISSUES.index("bone")
    brain = find_brains(tissues, 2.5)
    assert brain[:, 11:13, 8:16, 14:17].all() and not brain[:, 6:8, 6:8].any()
    assert brain[:, 8:18, 8:18, 6:14].all() and not brain[:, :5].any() and not brain[..., 19:].any()


def test_loss_of_a_right_and_of_a_wrong_answer():
    brains = torch.zeros(2, 1, 4, 4, 4)
    brains[:, :, :2] = 1
    logits = 20 * (2 * brains - 1) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    loss = extraction_loss(logits, brains)
    # No overlap: 1 - 1 / 65 of the soft Dice, and 20 for every voxel.
    torch.testing.assert_close(loss, torch.tensor([0.0, 21 - 1 / 65]), rtol=0, atol=1e-3)


def test_maps_of_training_and_validation_differ():
    assert {name: list(part) for name, part in split_maps(20).items()} == {
        "train": list(range(16)),
        "validation": [16, 17],
        "test": [18, 19],
    }


def test_a_training_ends_with_an_extractor_and_goes_on(folder, tmp_path):
    arguments = [
        *(
            "--config",
            "brain_extractor.yaml",
            "--data",
            f"heads:{folder}",
            "--train.output_dir",
            str(tmp_path / "run"),
        ),
        *("--unet", f"{{spacing: {SPACING}, block_out_channels: [4, 4]}}", "--objective", "{size: [16, 16, 16]}"),
        *("--train.batch_size", "2", "--train.validate_every", "2", "--train.validation_slices", "2"),
        *("--train.checkpoint_every", "1", "--train.report_to", "none", "--train.log_every", "1"),
        *("--optim.lr_scheduler", "constant", "--optim.warmup_steps", "0"),
    ]
    assert main([*arguments, "--train.max_steps", "2"]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 2] and log[2]["validation_loss"] > 0
    assert list((tmp_path / "run" / "samples").iterdir())
    extractor = BrainExtractor.from_pretrained(tmp_path / "run" / "pipeline")
    assert extractor.config.spacing == SPACING
    image = np.asarray(label_map(1.0).dataobj).astype(np.float32)
    assert extractor.find_brain([image], np.diag([5.0, 5.0, 5.0, 1.0])).shape == image.shape
    assert main([*arguments, "--train.max_steps", "3", "--train.resume", "latest"]) == 0
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "phantom-mini"], "`data.path` must be heads:FOLDER"),
        (["--data", "heads:"], "`data.path` must be heads:FOLDER"),
        (["--data", "heads:FOLDER", "--data.streaming", "true"], "`data.streaming` must be left out"),
        (["--data", "heads:FOLDER", "--objective", "{size: [16, 16, 20]}"], "`objective.size` must have sides divis"),
        (["--data", "heads:FOLDER", "--objective", "{size: [16, 16]}"], "`objective.size` must be three numbers"),
        (["--data", "heads:nothing"], "There are no label maps"),
    ],
)
def test_wrong_options_are_errors(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["--config", "brain_extractor.yaml", "--train.report_to", "none", *arguments])
