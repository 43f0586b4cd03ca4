from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from anodiff.data.phantoms.brains import make_subject

from ..script_server import find_python, run_python


ROOT = Path(__file__).parents[2]
SPLITS = {
    "train": [None, None, None],
    "validation": [None, "tumour"],
    "test": [None, "tumour", "stroke"],
}
RECIPE = {
    "reader": "volume_folders",
    "reader_options": {
        "modalities": {"flair": "flair.nii.gz", "t1": "t1.nii.gz"},
        "masks": ["lesion.nii.gz"],
        "brain": "brain.nii.gz",
        "splits": "splits",
    },
    "processor": {"modalities": ["flair", "t1"], "size": [16, 16], "brain_mask": "given"},
    "slices": {"min_brain": 0.1, "step": 3, "train": "healthy_by_label"},
    "license": "cc0-1.0",
}
TINY = {
    "unet": {
        "block_out_channels": [4, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
    },
    "scheduler": {"wavelength": 8.0, "octaves": 3},
    "inference": {"noise_level": 3, "threshold": 0.2, "median_size": 3, "slice_score": "max"},
    "data": {"augmentation": {"rotation": 5.0, "translation": [0.1, 0.1], "horizontal_flip": True}},
    "optim": {"learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_steps": 1},
    "train": {
        "max_steps": 4,
        "batch_size": 4,
        "log_every": 1,
        "validate_every": 2,
        "validation_slices": 6,
        "checkpoint_every": 2,
        "ema": {"decay": 0.9},
    },
}


class Workplace:
    """A folder with a raw data set, and scripts run in it as a person would, in processes of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        for split, lesions in SPLITS.items():
            names = []
            for number, lesion in enumerate(lesions):
                subject = make_subject(number, seed=len(split), lesion=lesion, spacing=6.0, anatomy="geometric")
                names.append(f"{split}_{number}")
                subject.save(folder / "raw" / names[-1])
            path = folder / "raw" / "splits" / f"{split}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(["subject", *names]))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    def run(
        self, script: str, *arguments, processes: int = 0, check: bool = True, environment: dict | None = None
    ) -> subprocess.CompletedProcess:
        """Runs a script of the repository; with `processes`, through `accelerate launch` on the CPU. `environment` holds
        variables beside those of this process."""
        if processes:
            # What the launcher starts several of instead of Python.
            python = {"PYTHON_EXEC": find_python(self.variables(environment))}
            begun = self.start(script, *arguments, processes=processes, environment={**(environment or {}), **python})
            out, error = begun.communicate()
            done = subprocess.CompletedProcess(begun.args, begun.returncode, out, error)
        else:
            done = run_python([ROOT / f"{script}.py", *arguments], self.folder, self.variables(environment))
        if check:
            assert done.returncode == 0, done.stderr[-5000:]
        return done

    def variables(self, others: dict | None = None) -> dict[str, str]:
        """Variables of a script: those of this process, a cache of its own, and others."""
        return {**os.environ, "HF_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1", **(others or {})}

    def start(self, script: str, *arguments, processes: int = 0, environment: dict | None = None) -> subprocess.Popen:
        """Begins to run a script as of [`run`], in a process group of its own."""
        command = [sys.executable, ROOT / f"{script}.py", *arguments]
        environment = self.variables(environment)
        if processes:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            # accelerate starts several processes on a CPU only through MPI, or, as here, through its launcher for GPUs.
            kind = ["--multi_gpu", "--main_process_port", port] if processes > 1 else ["--cpu"]
            launch = ["-m", "accelerate.commands.launch", *kind, "--num_processes", processes]
            command = [sys.executable, *launch, *command[1:]]
            environment["ACCELERATE_USE_CPU"] = "true"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(list(map(str, command)), cwd=self.folder, env=environment, **pipes)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    """Raw data, and `prepared` made of it by `preprocess.py`."""
    place = Workplace(tmp_path_factory.mktemp("workplace"))
    place.run("preprocess", "--recipe", "recipe.yaml", "--root", "raw", "--out", "prepared")
    return place


@pytest.fixture(scope="session")
def trained(workplace) -> str:
    """Folder of a run of four steps without interruption, relative to the workplace."""
    workplace.run("train", "--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", "one", processes=1)
    return "one"
