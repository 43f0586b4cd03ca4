"""`train.py --push_to_hub` over real HTTP, and the pipeline that others then get. Every client is a process of its own."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from anodiff import AnoDDPMPipeline, AnomalyPipeline


PULL = """
import json, sys
import numpy as np
from anodiff import AnomalyPipeline

subject, out, *models = sys.argv[1:]
maps = []
for model in models:
    pipeline = AnomalyPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    maps.append(pipeline({name: f"{subject}/{name}.nii.gz" for name in ("flair", "t1", "brain")}).anomaly_map)
np.savez(out, *maps)
print(json.dumps(type(pipeline).__name__))
"""


@pytest.fixture
def train(hub, workplace):
    """`train(run)` trains two steps and pushes them to owner/tiny."""

    def run(output: str, *arguments, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        return workplace.run(
            "train",
            *["--config", "tiny.yaml", "--data", "prepared", "--train.output_dir", output],
            *["--train.max_steps", 2, "--push_to_hub", "owner/tiny", *arguments],
            environment={**hub.environment(workplace.folder / "home"), **variables},
            check=check,
        )

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub) -> dict[str, bytes]:
    return {path: content for path, content in hub.files("owner/tiny").items() if path != ".gitattributes"}


def test_what_is_pushed_is_what_others_get(hub, hub_client, workplace, train, tmp_path):
    train("pushed")
    folder = workplace.folder / "pushed" / "pipeline"
    assert pushed(hub) == contents(folder)
    card = (folder / "README.md").read_text()
    assert 'from_pretrained("owner/tiny")' in card and "not a medical device" in card

    # In Python: the Hub's copy, read with an empty cache, and the local folder.
    subject = workplace.folder / "raw" / "test_1"
    assert hub_client(PULL, subject, tmp_path / "maps.npz", "owner/tiny", folder, home="empty") == "AnoDDPMPipeline"
    remote, local = np.load(tmp_path / "maps.npz").values()
    assert remote.shape == nib.load(subject / "flair.nii.gz").shape and remote.max() > 0
    np.testing.assert_array_equal(remote, local)
    assert any((tmp_path / "empty" / "hub").glob("models--owner--tiny/snapshots/*/unet/*.safetensors"))

    # With predict.py, again with an empty cache.
    workplace.run(
        "predict",
        *["--model", "owner/tiny", "raw/test_1", "-o", "remote", "--brain", "brain.nii.gz"],
        environment=hub.environment(tmp_path / "empty too"),
    )
    image = nib.load(workplace.folder / "remote" / "test_1" / "anomaly_map.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), local)


def test_a_card_that_somebody_wrote_stays(hub, workplace, train):
    train("carded", "--optim.lr_total_steps", 3)
    ours = hub.files("owner/tiny")["README.md"].decode()
    written = ours.replace("# ", "# Written by us: ", 1)
    hub.put("owner/tiny", {"README.md": written.encode()})
    weights = "unet/diffusion_pytorch_model.safetensors"
    before = hub.files("owner/tiny")[weights]
    done = train("carded", "--train.max_steps", 3, "--train.resume", "latest")
    assert hub.files("owner/tiny")["README.md"].decode() == written and hub.files("owner/tiny")[weights] != before
    assert "The card that the repository has" in done.stderr
    folder = workplace.folder / "carded" / "pipeline"
    assert pushed(hub) == contents(folder)


def titles(hub):
    return [title for _, title, _ in hub.repositories["model", "owner/tiny"].commits[1:]]


def test_every_checkpoint_is_pushed(hub, hub_client, train):
    arguments = ["--train.max_steps", 6, "--train.checkpoint_every", 2, "--train.hub_strategy", "every_save"]
    done = train("often", *arguments, "--train.hub_private", "true", "--train.hub_licence", "cc-by-4.0")
    assert titles(hub)[-1] == "Step 6, the end of the training"
    assert "Step 2" in titles(hub) and set(titles(hub)[:-1]) <= {"Step 2", "Step 4"}
    assert hub.repositories["model", "owner/tiny"].private
    assert "Pushed to" in done.stdout and "warning" not in done.stderr
    card = hub.files("owner/tiny")["README.md"].decode()
    assert "license: cc-by-4.0" in card and re.search(
        r"Trained to step 6 with 4 slices a step; .* minutes on 1 x", card
    )

    # What was pushed on the way is a whole pipeline with the weights of that step.
    repository = hub.repositories["model", "owner/tiny"]
    sha = next(sha for sha, title, _ in repository.commits if title == "Step 2")
    script = "import sys; from anodiff import AnomalyPipeline; print(AnomalyPipeline.from_pretrained('owner/tiny', revision=sys.argv[1]).config.noise_level)"
    assert hub_client(script, sha) == 3
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files("owner/tiny", revision=sha)[weights] != hub.files("owner/tiny")[weights]


def test_a_push_on_the_way_that_fails_is_a_warning(hub, train):
    hub.fail("POST", "/commit/", status=403, times=1)
    arguments = ["--train.max_steps", 4, "--train.checkpoint_every", 2, "--train.hub_strategy", "every_save"]
    done = train("bumpy", *arguments)
    assert "warning: owner/tiny was not pushed" in done.stderr and "The training goes on." in done.stderr
    assert titles(hub) == ["Step 4, the end of the training"]


def test_what_cannot_be_pushed_is_not_trained(hub, train, workplace):
    for arguments, variables, reason in (
        ([], {"HF_TOKEN": "hf_wrong"}, "401"),
        ([], {"HF_TOKEN": ""}, "There is no token"),
        (["--train.hub_licence", "mine"], {}, "must be one of"),
    ):
        done = train("never", *arguments, check=False, **variables)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "error: owner/tiny cannot be pushed to: " in done.stderr and reason in done.stderr
        assert "Nothing was trained" in done.stderr
        assert not (workplace.folder / "never").exists()


def evaluate(hub, workplace, output, *arguments, check=True):
    return workplace.run(
        "eval",
        *["--data", "prepared", "--output_dir", output, *arguments],
        environment=hub.environment(workplace.folder / "home"),
        check=check,
    )


def test_results_go_into_the_card(hub, hub_client, workplace, trained):
    # A folder goes up as a whole.
    folder = workplace.folder / "evaluated"
    shutil.copytree(workplace.folder / trained / "pipeline", folder)
    before = contents(folder)
    evaluate(
        hub, workplace, "eval-folder", "--model", "evaluated", "--push_to_hub", "owner/tiny", "--baselines", "false"
    )
    assert pushed(hub) == contents(folder)
    changed = {path for path, content in contents(folder).items() if before.get(path) != content}
    assert changed == {"README.md"}
    report = json.loads((workplace.folder / "eval-folder" / "report.json").read_text())
    card = ModelCard(pushed(hub)["README.md"].decode())
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert report["results"][0]["commit"] is None
    assert values["slice_auroc"] == report["results"][0]["metrics"]["slice_auroc"]
    assert "### prepared, split `test`" in card.text and "Not evaluated." not in card.text

    # Of a repository only the card changes, and somebody's words in it stay.
    version = hub.put("owner/tiny", {"README.md": (str(card) + "\nThanks to all.\n").encode()})
    before = pushed(hub)
    picture = workplace.folder / "mine.png"
    PIL.Image.new("RGB", (4, 4)).save(picture)
    other = ["--split", "validation", "--validation_split", "none", "--hub_picture", picture]
    evaluate(hub, workplace, "eval-id", "--model", "owner/tiny", "--push_to_hub", "owner/tiny", *other)
    report = json.loads((workplace.folder / "eval-id" / "report.json").read_text())
    assert report["results"][0]["commit"] == version
    after = pushed(hub)
    changed = {path for path, content in after.items() if before.get(path) != content}
    assert changed == {"README.md", "evaluation-prepared-validation.png"}
    text = after["README.md"].decode()
    assert (
        "Thanks to all." in text
        and "### prepared, split `validation`" in text
        and "### prepared, split `test`" in text
    )
    assert "](evaluation-prepared-validation.png)" in text
    assert {result.dataset_split for result in ModelCard(text).data.eval_results} == {"test", "validation"}
    script = "import json; from anodiff import AnomalyPipeline; print(json.dumps(AnomalyPipeline.from_pretrained('owner/tiny').config.threshold))"
    assert hub_client(script) == 0.2


def test_results_that_cannot_be_pushed(hub, workplace, trained):
    model = f"{trained}/pipeline"
    done = evaluate(
        hub, workplace, "eval-no", "--model", model, "--model", model, "--push_to_hub", "owner/b", check=False
    )
    assert done.returncode == 1 and "`push_to_hub` must be the one of `model` that is a Hub id" in done.stderr
    hub.fail("POST", "/api/repos/create", status=403)
    done = evaluate(hub, workplace, "eval-no", "--model", model, "--push_to_hub", "owner/tiny", check=False)
    assert done.returncode == 1 and "Nothing was evaluated." in done.stderr and "Traceback" not in done.stderr
    assert not (workplace.folder / "eval-no" / "report.json").exists()
    hub.failures.clear()
    hub.fail("POST", "/commit/", status=403)
    done = evaluate(hub, workplace, "eval-no", "--model", model, "--push_to_hub", "owner/tiny", check=False)
    assert done.returncode == 1 and "was not pushed" in done.stderr and "hf upload owner/tiny" in done.stderr
    assert (workplace.folder / "eval-no" / "report.json").exists()


def test_a_prepared_data_set_is_pushed(hub, workplace, tmp_path):
    def preprocess(out, *arguments, check=True):
        return workplace.run(
            "preprocess",
            *["--recipe", "recipe.yaml", "--root", "raw", "--out", out, "--push_to_hub", "owner/rows", *arguments],
            environment=hub.environment(workplace.folder / "home"),
            check=check,
        )

    hub.fail("POST", "/commit/", status=403)
    done = preprocess("pushed-rows", check=False)
    assert done.returncode == 1 and "All files are safe in" in done.stderr
    [line] = re.findall(r"^ +(hf upload .*)$", done.stderr, re.MULTILINE)
    assert "--repo-type dataset --private --delete 'data/*.parquet' " in line
    hub.failures.clear()
    # What an earlier version had under other names goes, and what somebody added stays.
    old = {"data/train-00000-of-00009.parquet": b"", "quality/a.png": b"", "corrections.csv": b"", "notes.md": b"mine"}
    hub.put("owner/rows", old, "dataset")
    preprocess(tmp_path / "rows")
    files = {path: content for path, content in hub.files("owner/rows", "dataset").items() if path != ".gitattributes"}
    assert files == contents(tmp_path / "rows") | {"notes.md": b"mine"}
    # Images of people are nobody's to give away: private unless asked for.
    assert hub.repositories["dataset", "owner/rows"].private
    done = preprocess(tmp_path / "more", "--hub_private", "false", check=False)
    assert done.returncode == 0, done.stderr

    # Where the licence forbids more, into a private repository, and the message says so.
    recipe = yaml.safe_load((workplace.folder / "recipe.yaml").read_text()) | {"rehosting": "forbidden"}
    (workplace.folder / "private.yaml").write_text(yaml.safe_dump(recipe))
    done = preprocess(tmp_path / "mine", "--recipe", "private.yaml", "--push_to_hub", "owner/mine")
    assert "As a private repository only: the licence of the images forbids" in done.stdout
    assert hub.repositories["dataset", "owner/mine"].private

    # And read by its id, with an empty cache.
    workplace.run(
        "train",
        *["--config", "tiny.yaml", "--data", "owner/rows", "--train.max_steps", 2],
        *["--train.output_dir", tmp_path / "of-rows"],
        environment=hub.environment(tmp_path / "empty"),
    )
    assert (tmp_path / "of-rows" / "pipeline" / "model_index.json").exists()


def test_a_push_that_fails_loses_nothing(hub, hub_client, workplace, train):
    hub.fail("POST", "/commit/", status=403)
    done = train("unpushed", check=False)
    folder = workplace.folder / "unpushed" / "pipeline"
    assert done.returncode == 1
    # The message, not a stack of HTTP calls.
    assert "error: owner/tiny was not pushed: " in done.stderr and "403" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"All files are safe in {folder.resolve()}" in done.stderr
    assert pushed(hub) == {}

    pipeline = AnomalyPipeline.from_pretrained(folder)
    assert type(pipeline) is AnoDDPMPipeline and pipeline.config.noise_level == 3
    pipeline.set_progress_bar_config(disable=True)
    slices = torch.randn(2, 2, 16, 16, generator=torch.manual_seed(0))
    assert torch.isfinite(pipeline(slices).anomaly_map).all()

    # The command of the message, as it stands, once the Hub is back.
    hub.failures.clear()
    [line] = re.findall(r"^ +(hf upload .*)$", done.stderr, re.MULTILINE)
    hub_client(
        "import subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); print('true')",
        Path(sys.executable).with_name("hf"),
        *shlex.split(line)[1:],
    )
    assert pushed(hub) == contents(folder)
