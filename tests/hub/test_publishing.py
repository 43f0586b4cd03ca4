"""Push and pull over real HTTP. Clients are processes of their own: the Hub's address is read when huggingface_hub is imported."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, parse_eval_result_entries

from anodiff import AnoDDPMPipeline
from anodiff.hub.publishing import PublishingError, complete_folder, copy_picture, push_folder, write_card

from ..hub_server import READ_TOKEN
from ..tiny import make_extractor, make_pipeline


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
    return pipeline(torch.randn(3, 1, 16, 16, generator=torch.manual_seed(0))).anomaly_map

def compare(pipeline):
    same = torch.equal(anomaly_map(pipeline), expected)
    same = same and (pipeline.brain_extractor.last.bias == -1).all().item()
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


@pytest.fixture
def folder(tmp_path):
    extractor = make_extractor()
    pipeline = make_pipeline("AnoDDPMPipeline", ("flair",), noise_level=2, threshold=0.5, brain_extractor=extractor)
    pipeline.save_pretrained(tmp_path / "pipeline")
    complete_folder(tmp_path / "pipeline", CARD)
    return tmp_path / "pipeline"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_complete_folder_holds(folder):
    assert sorted(contents(folder)) == [
        "README.md",
        "brain_extractor/config.json",
        "brain_extractor/diffusion_pytorch_model.safetensors",
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
        "image-segmentation", data_set, data_set, "slice_auroc", 0.87, dataset_args={"modality": "flair"}
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
    [url] = hub_client(PUSH, folder, "owner/tiny", "1", fresh=True)
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


def test_a_push_that_fails_says_how_to_do_it_later(hub, hub_client, folder):
    before = contents(folder)
    # The Hub refuses the first request, the right to write, and the end of the upload.
    hub.fail("POST", "/api/repos/create", status=402, times=1)
    hub.fail("GET", "/auth-check", status=403, times=1)
    hub.fail("POST", "/commit/", status=403, times=1)
    *failed, url = hub_client(PUSH, folder, "owner/tiny", "4", fresh=True)
    assert url == f"{hub.url}/owner/tiny"
    assert contents(folder) == before
    for message, reason in zip(failed, ("402", "403", "403"), strict=True):
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
    [message] = hub_client(PUSH, folder, "owner/tiny", "1", HF_TOKEN="hf_wrong", fresh=True)
    assert "401" in message and "All files are safe" in message
    hub.requests.clear()
    [message] = hub_client(PUSH, folder, "owner/tiny", "1", HF_TOKEN="", fresh=True)
    assert "There is no token" in message and "hf auth login" in message and "All files are safe" in message
    [message] = hub_client(PUSH, folder, "no such name", "1", fresh=True)
    assert "Repo id must use alphanumeric chars" in message
    assert hub.requests == []
    (folder / "README.md").write_text(CARD.replace("mit", "all mine"))
    [message] = hub_client(PUSH, folder, "owner/tiny", "1", fresh=True)
    assert '"license" must be one of' in message and "All files are safe" in message


PUSH_PIPELINE = """
import json, sys
from anodiff import AnoDDPMPipeline
from anodiff.hub.publishing import PublishingError

pipeline = AnoDDPMPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
answers = []
for arguments in json.loads(sys.argv[2]):
    try:
        answers.append(pipeline.push_to_hub(**arguments))
    except PublishingError as error:
        answers.append(str(error))
pipeline.save_pretrained("saved", push_to_hub=True, repo_id="owner/saved", private=True)
print(json.dumps(answers))
"""


def test_a_pipeline_pushes_itself(hub, hub_client, folder, tmp_path):
    hub.put("owner/carded", {"README.md": b"---\nlicense: mit\n---\n# Written by hand\n"})
    arguments = [
        {"repo_id": "owner/tiny", "licence": "cc-by-4.0", "private": True},
        {"repo_id": "owner/carded"},
        {"repo_id": "owner/half", "variant": "fp16"},
    ]
    (tmp_path / "temporary").mkdir()
    answers = hub_client(PUSH_PIPELINE, folder, json.dumps(arguments), TMPDIR=str(tmp_path / "temporary"))
    assert answers == [f"{hub.url}/owner/{name}" for name in ("tiny", "carded", "half")]
    assert hub.repositories["model", "owner/tiny"].private and hub.repositories["model", "owner/saved"].private
    assert not list((tmp_path / "temporary").glob("AnoDDPMPipeline-*"))
    pushed = hub.files("owner/tiny")
    wanted = contents(folder)
    card = pushed["README.md"].decode()
    assert "license: cc-by-4.0" in card and 'from_pretrained("owner/tiny")' in card
    assert set(pushed) - {".gitattributes"} == set(wanted)
    assert pushed["unet/diffusion_pytorch_model.safetensors"] == wanted["unet/diffusion_pytorch_model.safetensors"]
    # What was loaded from a folder does not tell where.
    assert not any(str(tmp_path).encode() in content for content in pushed.values())
    # A card that is there stays.
    assert b"# Written by hand" in hub.files("owner/carded")["README.md"]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files("owner/half")
    assert hub.files("owner/saved")["pipeline.py"] == wanted["pipeline.py"]


def test_a_pipeline_that_cannot_push_itself_is_safe(hub, hub_client, folder, tmp_path):
    hub.fail("POST", "/commit/", status=403, times=1)
    [message] = hub_client(PUSH_PIPELINE, folder, json.dumps([{"repo_id": "owner/tiny"}]), TMPDIR=str(tmp_path))
    [kept] = tmp_path.glob("AnoDDPMPipeline-*")
    assert f"All files are safe in {kept}." in message
    assert AnoDDPMPipeline.from_pretrained(kept).config.threshold == 0.5


OPEN = """
import json, sys
from anodiff.hub.publishing import PublishingError, open_repository

answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        answers.append(open_repository(**arguments))
    except PublishingError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def test_a_repository_is_opened_before_the_work(hub, hub_client):
    hub.put("owner/public", {"README.md": b"# Public"})
    asked = [
        {"repo_id": "owner/new", "private": True, "licence": "mit"},
        {"repo_id": "owner/new", "private": True},
        {"repo_id": "owner/public", "private": True},
        {"repo_id": "owner/public"},
        {"repo_id": "owner/new", "licence": "all mine"},
        {"repo_id": "no such name"},
    ]
    new, again, public, as_it_is, licence, name = hub_client(OPEN, json.dumps(asked))
    assert new == again == f"{hub.url}/owner/new" and hub.repositories["model", "owner/new"].private
    assert "owner/public exists and is public, and a private repository was asked for" in public
    assert as_it_is == f"{hub.url}/owner/public"
    assert "must be one of apache-2.0" in licence
    assert "Repo id must use alphanumeric chars" in name

    # A token that may only read: a new repository, one that exists.
    refused = hub_client(
        OPEN, json.dumps([{"repo_id": "owner/newer"}, {"repo_id": "owner/public"}]), HF_TOKEN=READ_TOKEN
    )
    assert all("403" in answer and "may read, not write" in answer for answer in refused)


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


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *[(".png", "L"), (".png", "RGB"), (".png", "P"), (".png", "RGBA"), (".png", "I;16")],
        *[(".jpg", "L"), (".jpg", "RGB"), (".jpg", "CMYK"), (".gif", "P"), (".webp", "RGB"), (".webp", "RGBA")],
    ],
)
def test_a_picture_is_pixels_only_and_upright(suffix, mode, tmp_path):
    shades = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4).repeat(8, 0).repeat(8, 1)
    if mode == "I;16":
        picture = PIL.Image.fromarray(shades.astype(np.uint16) * 256)
    else:
        picture = PIL.Image.fromarray(shades).convert("RGB")
        picture = picture.quantize() if mode == "P" else picture.convert(mode)
    source, target = tmp_path / f"source{suffix}", tmp_path / f"target{suffix}"
    exif, text = PIL.Image.Exif(), PIL.PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010E] = 6, "Jane Doe"  # to be turned by a quarter; a description
    text.add_text("Comment", "Jane Doe")
    picture.save(source, exif=exif, pnginfo=text, comment="Jane Doe", xmp=b"Jane Doe", icc_profile=b"Jane Doe" * 20)
    assert b"Jane Doe" in source.read_bytes()

    copy_picture(source, target)
    assert b"Jane Doe" not in target.read_bytes()
    with PIL.Image.open(target) as copied:
        assert not copied.getexif() and not {"comment", "Comment", "exif", "xmp", "icc_profile"} & set(copied.info)
        expected = shades if suffix == ".gif" else np.rot90(shades, -1)  # GIF has no EXIF
        seen = np.asarray(copied) / 256 if mode == "I;16" else np.asarray(copied.convert("L"), float)
    assert seen.shape == expected.shape
    assert np.abs(seen - expected).mean() < (6 if suffix in (".jpg", ".webp") else 0.01)


@pytest.mark.parametrize(("name", "content"), [("a.png", b"a picture"), ("a.svg", b"<svg/>"), ("a.png", b"")])
def test_what_is_no_picture(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is no picture that can be shown in a card"):
        copy_picture(tmp_path / name, tmp_path / f"copy-{name}")
    with pytest.raises(FileNotFoundError):
        copy_picture(tmp_path / "nothing.png", tmp_path / "copy.png")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("data_set", ["../x", "lab/../../x", "lab\\x/y", "lab/x\ny", "a/b/c"])
def test_no_card_names_a_file_elsewhere(data_set, tmp_path):
    result = EvalResult("image-segmentation", data_set, "x", "slice_auroc", 0.87)
    data = ModelCardData(license="mit", model_name="tiny", eval_results=[result])
    (tmp_path / "in").mkdir()
    write_card(tmp_path / "in", str(ModelCard(f"---\n{data.to_yaml()}\n---\n# Tiny\n")))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "in"]
