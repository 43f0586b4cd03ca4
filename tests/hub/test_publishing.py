"""Push and pull over real HTTP. Clients are processes of their own: the Hub's address is read when huggingface_hub is imported."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData, parse_eval_result_entries

from anodiff import AnoDDPMPipeline, AnoDDPMScheduler, VolumeProcessor
from anodiff.hub.publishing import PublishingError, complete_folder, push_folder


CARD = "---\nlicense: mit\ntags:\n- anodiff\n---\n\n# Tiny\n"

PUSH = """
import json, sys
from anodiff.hub.publishing import PublishingError, push_folder

answers = []
for _ in range(int(sys.argv[3])):
    try:
        answers.append(push_folder(sys.argv[1], sys.argv[2], commit_message="Tiny"))
    except PublishingError as error:
        answers.append(str(error))
assert "torch" not in sys.modules
print(json.dumps(answers))
"""

PULL = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from anodiff import AnoDDPMPipeline, AnomalyPipeline

def anomaly_map(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(torch.randn(3, 1, 8, 8, generator=torch.manual_seed(0))).anomaly_map

def compare(pipeline):
    same = torch.equal(anomaly_map(pipeline), expected)
    return [type(pipeline) is AnoDDPMPipeline, same, pipeline.config.threshold]

folder, repo, custom, *revisions = sys.argv[1:]
expected = anomaly_map(AnoDDPMPipeline.from_pretrained(folder))
assert expected.max() > 0
answers = {
    "own": compare(AnoDDPMPipeline.from_pretrained(repo)),
    "base": compare(AnomalyPipeline.from_pretrained(repo)),
}
if custom:
    pipeline = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
    answers["remote code"] = compare(pipeline)
answers |= {revision: compare(AnomalyPipeline.from_pretrained(repo, revision=revision)) for revision in revisions}
print(json.dumps(answers))
"""

PULL_WHAT_IS_NOT_OURS = """
import json, sys
from anodiff import AnoDDPMPipeline, AnomalyPipeline

answers = {}
for repo in sys.argv[1:]:
    for name, pipeline_class in {"base": AnomalyPipeline, "own": AnoDDPMPipeline}.items():
        try:
            pipeline_class.from_pretrained(repo)
        except (OSError, ValueError) as error:
            answers[f"{repo} {name}"] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    processor = VolumeProcessor(modalities=("flair",), size=(8, 8))
    pipeline = AnoDDPMPipeline(
        unet, AnoDDPMScheduler(num_train_timesteps=100), processor, noise_level=2, threshold=0.5
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    complete_folder(tmp_path / "pipeline", CARD)
    return tmp_path / "pipeline"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_complete_folder_holds(folder):
    assert sorted(contents(folder)) == [
        "README.md",
        "model_index.json",
        "pipeline.py",
        "processor/processor_config.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert (folder / "README.md").read_text() == CARD
    assert (folder / "pipeline.py").read_text().startswith("from anodiff import AnoDDPMPipeline")


def test_a_folder_without_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved pipeline"):
        complete_folder(tmp_path, CARD)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("data_set", "is_written"), [("lab/lesions", True), ("phantom", False), ("data/local", False)]
)
def test_results_of_a_data_set_of_the_hub(folder, data_set, is_written, tmp_path, monkeypatch):
    (tmp_path / "data" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    result = EvalResult(
        "image-segmentation", data_set, data_set, "slice_auroc", 0.87, metric_args={"modality": "flair"}
    )
    data = ModelCardData(license="mit", model_name="tiny", eval_results=[result])
    complete_folder(folder, str(ModelCard(f"---\n{data.to_yaml()}\n---\n# Tiny\n")))
    written = folder / ".eval_results" / f"{data_set.replace('/', '--')}.yaml"
    assert written.exists() == is_written
    if is_written:
        [entry] = parse_eval_result_entries(yaml.safe_load(written.read_text()))
        assert (entry.dataset_id, entry.task_id, entry.value) == ("lab/lesions", "slice_auroc", 0.87)
        assert entry.notes == "modality: flair"


def test_push_and_pull(hub, hub_client, folder):
    [url] = hub_client(PUSH, folder, "owner/tiny", "1")
    assert url == f"{hub.url}/owner/tiny"
    pushed = hub.files("owner/tiny")
    pushed.pop(".gitattributes")
    assert pushed == contents(folder)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)  # the weights went the way of large files
    index = json.loads(pushed["model_index.json"])
    assert index["_class_name"] == "AnoDDPMPipeline"
    assert index["scheduler"] == ["anodiff", "AnoDDPMScheduler"]
    assert index["processor"] == ["anodiff", "VolumeProcessor"]

    # A tag keeps what it was set on; another process with an empty cache.
    repository = hub.repositories["model", "owner/tiny"]
    repository.tags["v1"] = repository.head
    hub.put("owner/tiny", {"model_index.json": json.dumps({**index, "threshold": 0.25}).encode()})
    (folder / "model_index.json").write_text(json.dumps({**index, "threshold": 0.25}))
    assert hub_client(PULL, folder, "owner/tiny", "yes", "v1", home="empty") == {
        "own": [True, True, 0.25],
        "base": [True, True, 0.25],
        "remote code": [True, True, 0.25],
        "v1": [True, True, 0.5],
    }

    # Once pulled, no network is needed, and none is used. (diffusers always asks the Hub for remote code.)
    hub.requests.clear()
    answers = hub_client(PULL, folder, "owner/tiny", "", home="empty", HF_HUB_OFFLINE="1")
    assert answers == {"own": [True, True, 0.25], "base": [True, True, 0.25]}
    assert hub.requests == []


def test_repositories_that_are_no_pipeline_of_ours(hub, hub_client, folder, tmp_path):
    hub.put("owner/notes", {"README.md": b"# Notes"})
    unet = AnoDDPMPipeline.from_pretrained(folder).unet
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    hub.put("owner/ddpm", contents(tmp_path / "ddpm"))
    answers = hub_client(PULL_WHAT_IS_NOT_OURS, "owner/missing", "owner/notes", "owner/ddpm")
    assert len(answers) == 6
    assert re.search(r"owner/missing is not a local folder.*model identifier", answers["owner/missing base"])
    assert re.search(r"owner/notes does not appear to have a file named model_index.json", answers["owner/notes base"])
    assert "ValueError: owner/ddpm holds a DDPMPipeline, which is no pipeline of anodiff" in answers["owner/ddpm base"]
    assert "owner/missing" in answers["owner/missing own"]
    assert "owner/notes" in answers["owner/notes own"]
    assert "owner/ddpm holds a DDPMPipeline, not a AnoDDPMPipeline" in answers["owner/ddpm own"]


def test_a_push_that_fails_says_how_to_do_it_later(hub, hub_client, folder):
    before = contents(folder)
    # The Hub breaks at the first request, at the end of the upload, and with a cut line.
    hub.fail("POST", "/api/repos/create", status=500, times=1)
    hub.fail("POST", "/commit/", status=500, times=1)
    hub.fail("POST", "/commit/", status=None, times=1)
    *failed, url = hub_client(PUSH, folder, "owner/tiny", "4")
    assert url == f"{hub.url}/owner/tiny"
    assert contents(folder) == before
    for message, reason in zip(failed, ("500", "500", "disconnected"), strict=True):
        assert message.startswith("owner/tiny was not pushed: ") and reason in message
        assert f"All files are safe in {folder}" in message

    # The command of the message, as it stands.
    del hub.repositories["model", "owner/tiny"]
    command = shlex.split(failed[0].splitlines()[-1])
    assert command[:3] == ["hf", "upload", "owner/tiny"]
    script = (
        "import subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); print('true')"
    )
    hub_client(script, Path(sys.executable).with_name("hf"), *command[1:])
    pushed = hub.files("owner/tiny")
    pushed.pop(".gitattributes")
    assert pushed == before


def test_a_push_that_the_hub_refuses(hub, hub_client, folder):
    [message] = hub_client(PUSH, folder, "owner/tiny", "1", HF_TOKEN="hf_wrong")
    assert "401" in message and "All files are safe" in message
    hub.requests.clear()
    [message] = hub_client(PUSH, folder, "owner/tiny", "1", HF_TOKEN="")
    assert "there is no token" in message and "hf auth login" in message and "All files are safe" in message
    [message] = hub_client(PUSH, folder, "no such name", "1")
    assert "Repo id must use alphanumeric chars" in message
    assert hub.requests == []
    (folder / "README.md").write_text(CARD.replace("mit", "all mine"))
    [message] = hub_client(PUSH, folder, "owner/tiny", "1")
    assert '"license" must be one of' in message and "All files are safe" in message


def test_a_private_data_set(hub, hub_client, tmp_path):
    (tmp_path / "data set").mkdir()
    (tmp_path / "data set" / "a.txt").write_text("a")
    script = """
import json, sys
from anodiff.hub.publishing import push_folder

print(json.dumps(push_folder(sys.argv[1], "owner/rows", repo_type="dataset", private=True)))
"""
    assert hub_client(script, tmp_path / "data set") == f"{hub.url}/datasets/owner/rows"
    assert hub.repositories["dataset", "owner/rows"].private
    assert hub.files("owner/rows", "dataset")["a.txt"] == b"a"


def test_a_missing_folder_is_no_matter_of_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        push_folder(tmp_path / "nothing", "owner/tiny")
    assert issubclass(PublishingError, RuntimeError)
