"""Checkpoints that come with the package: made, found by their names, loaded and listed."""

import configparser
import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import anodiff
from anodiff import AnoDDPMPipeline, AnomalyPipeline
from anodiff.files import read_json, write_json
from anodiff.hub import shipped
from anodiff.hub.model_card import PROTOCOL_FIELDS
from anodiff.hub.publishing import push_folder
from anodiff.list_models import main as list_models
from anodiff.publish import main as publish
from anodiff.ship import METRICS
from anodiff.ship import main as ship

from ..tiny import assert_same_map, make_pipeline, make_volume


ROOT = Path(anodiff.__file__).parent
MEGABYTES = 12


def make_report(**metrics) -> dict:
    """A report of eval.py, as far as it goes into a card."""
    data = {"name": "lesions", "split": "test", "subjects": 3, "slices": 30, "anomalous_slices": 9}
    row = {"name": "AnoDDPM (run)", "kind": "pipeline", "model": "run", "metrics": metrics, "seconds_per_slice": 0.1}
    plain = {"name": "intensity of flair", "kind": "baseline", "settings": {}, "metrics": dict.fromkeys(METRICS, 0.25)}
    policy = {"threshold_policy": "oracle: some; healthy: 0.01 of the voxels of healthy slices; yen: some"}
    return {
        **{"data": data, "protocol": dict.fromkeys(PROTOCOL_FIELDS, "some") | policy, "results": [row, plain]},
        **{"seed": 0, "anodiff": anodiff.__version__, "versions": {}},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of shipped checkpoints, made of `flair`, and of `t1`, which has the network of `any`."""
    folder = tmp_path_factory.mktemp("shipped")
    for modality in ("flair", "image", "t1"):
        make_pipeline("AnoDDPMPipeline", (modality,), noise_level=2).save_pretrained(folder / modality)
    (folder / "flair" / "config.yaml").write_text("method: anoddpm\n")
    (folder / "flair" / "validation.jsonl").write_text('{"step": 250, "validation_loss": 0.0625}\n')
    write_json(folder / "synthetic.json", make_report(threshold_healthy=0.125))
    write_json(folder / "real.json", make_report(threshold_healthy=0.75))
    write_json(folder / "lesions.json", make_report(**dict.fromkeys(METRICS, 0.5)))
    figures = [{"data": "patients", "rows": {shipped.THIS: {"AP": [0.6, 0.55, 0.65]}, "intensity": {"AP": [0.3]}}}]
    write_json(folder / "figures.json", figures)

    def make(name, model, *arguments):
        given = ["--model", folder / model, "--name", name, "--purpose", f"Lesions in {model}", "--default", "true"]
        assert ship([*map(str, given), "--output", str(folder / "checkpoints"), *map(str, arguments)]) == 0

    made_of = ["--synthetic", folder / "synthetic.json", "--real", folder / "real.json"]
    made_of += ["--reports", f"[{folder / 'lesions.json'}]", "--figures", folder / "figures.json"]
    make("tiny-flair", "flair", *made_of, "--reproduce", "[accelerate launch train.py]")
    make("tiny-any", "image")
    make("tiny-t1", "t1", "--shares", "{unet: tiny-any}")
    return folder


@pytest.fixture
def checkpoints(made, monkeypatch) -> Path:
    monkeypatch.setattr(shipped, "SHIPPED", made / "checkpoints")
    return made / "checkpoints"


def test_what_is_shipped_is_packaged_and_small():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    patterns = [line.strip() for line in parser["options.package_data"]["anodiff"].splitlines()]
    files = [path for path in (ROOT / "checkpoints").rglob("*") if path.is_file()]
    for path in files:
        # As setuptools matches: `*` is no slash.
        name = path.relative_to(ROOT).as_posix()
        assert any(pattern.count("/") == name.count("/") and fnmatch.fnmatch(name, pattern) for pattern in patterns), (
            name
        )
    assert sum(path.stat().st_size for path in files) < MEGABYTES * 1e6


@pytest.mark.parametrize("name", shipped.list_shipped())
def test_what_is_shipped_is_complete(name):
    """Weights of one checkpoint that others share may have been made anew without them: their SHA-256 says so."""
    folder, record = shipped.SHIPPED / name, shipped.list_shipped()[name]
    assert set(record) == {
        *("purpose", "method", "modality", "default", "thresholds", "figures", "reproduce", "shares"),
    }
    assert (folder / "README.md").is_file() and "SynthSeg" in (folder / "NOTICE").read_text(encoding="utf-8")
    for path in folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} <= {torch.float16, torch.int64}
    if record["modality"] is not None:
        pipe = AnomalyPipeline.from_pretrained(name)
        assert list(pipe.processor.config.modalities) == [record["modality"]]
        assert pipe.unet.dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny-flair", "tiny-any", "tiny-t1"])
def test_a_bare_name_loads_without_a_request(name, made, checkpoints, near_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = AnomalyPipeline.from_pretrained(name)
    assert type(pipe) is type(AnoDDPMPipeline.from_pretrained(name)) is AnoDDPMPipeline
    assert near_hub.requests == []
    assert pipe.unet.dtype == torch.float32
    for called in ("dtype", "torch_dtype"):
        assert AnomalyPipeline.from_pretrained(name, **{called: torch.bfloat16}).unet.dtype == torch.bfloat16
    modality = pipe.processor.config.modalities[0]
    original = AnomalyPipeline.from_pretrained(made / modality)
    for one in (pipe, original):
        one.set_progress_bar_config(disable=True)
    # float16 has eleven bits.
    expected = original(make_volume()).anomaly_map
    assert_same_map(pipe(make_volume()).anomaly_map, expected, 0.02)
    # A save holds all of it.
    pipe.save_pretrained(tmp_path / "whole")
    whole = AnomalyPipeline.from_pretrained(tmp_path / "whole")
    whole.set_progress_bar_config(disable=True)
    assert_same_map(whole(make_volume()).anomaly_map, pipe(make_volume()).anomaly_map, 1e-6)


def test_a_folder_and_an_id_win_over_a_name(checkpoints, near_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pipeline("AnoDDPMPipeline", ("t2",)).save_pretrained("tiny-flair")
    assert list(AnomalyPipeline.from_pretrained("tiny-flair").processor.config.modalities) == ["t2"]
    assert near_hub.requests == []
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository owner/tiny-flair"):
        AnomalyPipeline.from_pretrained("owner/tiny-flair")
    assert near_hub.requests


@pytest.mark.parametrize("kind", [AnomalyPipeline, AnoDDPMPipeline])
@pytest.mark.parametrize("name", ["tiny-flare", "gpt2"])
def test_an_unknown_name_is_told_what_there_is_without_a_request(kind, name, checkpoints, near_hub):
    with pytest.raises(FileNotFoundError, match=f"no folder {name}, .*: tiny-any, tiny-flair, tiny-t1"):
        kind.from_pretrained(name)
    assert near_hub.requests == []


def test_an_installation_without_any(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="this installation has none"):
        AnomalyPipeline.from_pretrained("tiny-flair")
    with pytest.raises(FileNotFoundError, match="This installation has no checkpoints"):
        list_models([])


def test_a_shared_component_is_checked_and_missed(checkpoints, tmp_path, monkeypatch):
    copy = shutil.copytree(checkpoints, tmp_path / "copy")
    assert not (copy / "tiny-t1" / "unet").exists()
    AnomalyPipeline.from_pretrained(copy / "tiny-t1")
    weights = copy / "tiny-any" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors of .*tiny-t1 is not the file"):
        AnomalyPipeline.from_pretrained(copy / "tiny-t1")
    with pytest.raises(ValueError, match="tiny-t1 has no unet of its own: `publish.py` pushes it whole"):
        push_folder(copy / "tiny-t1", "lab/tiny-t1")
    shutil.rmtree(copy / "tiny-any")
    with pytest.raises(FileNotFoundError, match="shares its `unet` with tiny-any, which is not beside it"):
        AnomalyPipeline.from_pretrained(copy / "tiny-t1")


def test_the_threshold_in_use_is_that_of_synthetic_slices(checkpoints):
    assert AnomalyPipeline.from_pretrained("tiny-flair").config.threshold == 0.125
    thresholds = read_json(checkpoints / "tiny-flair" / "shipped.json")["thresholds"]
    assert [thresholds[kind]["threshold"] for kind in ("synthetic", "real")] == [0.125, 0.75]
    assert AnomalyPipeline.from_pretrained("tiny-any").config.threshold is None


def test_the_card_says_what_it_is(checkpoints, capsys):
    assert list_models(["tiny-flair"]) == 0
    card = capsys.readouterr().out
    assert card.strip() == (checkpoints / "tiny-flair" / "README.md").read_text(encoding="utf-8").strip()
    for text in (
        *("license: apache-2.0", "# tiny-flair", 'from_pretrained("tiny-flair")', "predict --model tiny-flair scan"),
        *("no scan of anybody was seen", "residuals on real texture are larger", "not a medical device"),
        "Threshold that 0.01 of the voxels of healthy slices exceed, generated images, in use (lesions): 0.125.\n",
        "scans; `threshold=` of a call and `--threshold` take it (lesions): 0.75.\n\n## Inference defaults",
        "```\n\nValidation loss of the averaged weights, on fixed slices with fixed noise: lowest at step 250, 0.062.",
        *(
            "| 250 | 0.062 |",
            "accelerate launch train.py",
            "| this checkpoint | 0.600 (0.55 to 0.65) |",
            "### lesions, split `test`",
        ),
    ):
        assert text in card, text
    assert not (checkpoints / "tiny-flair" / "validation.jsonl").exists()
    assert "\n\n\n" not in card and "method: anoddpm\n" in card
    assert (checkpoints / "tiny-flair" / "config.yaml").is_file()
    notice = (checkpoints / "tiny-flair" / "NOTICE").read_text(encoding="utf-8")
    assert "tiny-flair, a checkpoint" in notice and "BBillot/SynthSeg" in notice and "102789, 2023" in notice


def test_the_list(checkpoints, capsys):
    def size(name):
        return sum(path.stat().st_size for path in (checkpoints / name).rglob("*") if path.is_file()) / 1e6

    assert list_models([]) == 0
    said = capsys.readouterr().out
    assert f"tiny-flair: Lesions in flair\n    AnoDDPM, partial; flair; {size('tiny-flair'):.2f} MB; default\n" in said
    assert "    patients: AP 0.600 (0.55 to 0.65); intensity: AP 0.300\n" in said
    assert "lesions, test, 3 subjects, 30 slices: AP 0.500" in said
    assert (
        f"tiny-t1: Lesions in t1\n    AnoDDPM, partial; t1; {size('tiny-t1'):.2f} MB and unet of tiny-any; default\n"
        in said
    )
    with pytest.raises(ValueError, match="`NAME` must be one of tiny-any, tiny-flair, tiny-t1, got 'tiny'"):
        list_models(["tiny"])


@pytest.mark.parametrize(
    ("modality", "name", "reason"),
    [
        ("flair", "tiny-flair", "it is the default for flair"),
        ("t2", "tiny-any", "it takes any contrast, and none is for t2 alone"),
        (None, "tiny-any", "it takes any contrast, and the modality is not known"),
        ("ct", None, "fits ct: their modalities are image, flair, t1"),
    ],
)
def test_the_one_that_fits(checkpoints, modality, name, reason):
    if name is None:
        with pytest.raises(ValueError, match=reason):
            shipped.choose_shipped(modality)
    else:
        assert shipped.choose_shipped(modality) == (name, reason)


@pytest.mark.parametrize("name", shipped.ANY)
def test_networks_for_any_contrast(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "checkpoints")
    make_pipeline("AnoDDPMPipeline", (name,)).save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--name", "general", "--purpose", "Lesions", "--default", "true"]
    ship([*given, "--output", str(tmp_path / "checkpoints")])
    assert shipped.choose_shipped("t2")[0] == "general"
    list_models([])
    list_models(["general"])
    said = capsys.readouterr().out
    assert "any contrast;" in said and 'pipe("scan.nii.gz")' in said


def test_what_cannot_be_shipped(made, tmp_path):
    def make(model="flair", name="new", *arguments):
        given = ["--model", made / model, "--name", name, "--purpose", "x", "--output", tmp_path]
        ship([*map(str, given), *arguments])

    make("image", "any")
    make("image", "any", "--default", "true")  # again: in its place
    before = json.dumps(sorted(str(path) for path in tmp_path.rglob("*")))
    make_pipeline("AnoDDPMPipeline", ("flair", "t1")).save_pretrained(made / "two")
    other = make_pipeline("AnoDDPMPipeline", ("t1",))
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    other.save_pretrained(made / "other")
    with torch.no_grad():
        other.unet.conv_in.bias += 1e6
    other.save_pretrained(made / "large")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("the user's")
    for arguments, message in (
        (("two",), "must be a pipeline of one modality, got flair, t1"),
        (
            ("other", "new", "--shares", "{unet: any}"),
            "diffusion_pytorch_model.safetensors of the `unet` .* is not that of any",
        ),
        (("other", "new", "--shares", "{net: any}"), "`shares` must name components of AnoDDPMPipeline"),
        (("image", "new", "--default", "true"), "`default`: any is the default for image already"),
        (("image/unet", "new", "--default", "true"), "`default` belongs to pipelines, and .*unet has no model_index"),
        (("large",), "conv_in.bias of the `unet` of .*large is not finite in float16"),
        (("flair", "mine"), "mine is no shipped checkpoint: its place is needed"),
        (("flair", "../x"), "The name of a checkpoint"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            make(*arguments)
    shutil.rmtree(tmp_path / "mine")
    assert json.dumps(sorted(str(path) for path in tmp_path.rglob("*"))) == before


def test_a_component_that_is_a_checkpoint_of_its_own(checkpoints, near_hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "checkpoints")
    pipe = make_pipeline("DAEPipeline", ("flair",))
    pipe.save_pretrained(tmp_path / "model")
    given = ["--output", str(tmp_path / "checkpoints"), "--purpose", "A network."]
    ship(["--model", str(tmp_path / "model" / "unet"), "--name", "network", *given])
    ship(["--model", str(tmp_path / "model"), "--name", "whole", "--shares", "{unet: network}", *given])
    assert not (tmp_path / "checkpoints" / "whole" / "unet").exists()
    loaded = AnomalyPipeline.from_pretrained("whole")
    loaded.set_progress_bar_config(disable=True)
    assert_same_map(loaded(make_volume()).anomaly_map, pipe(make_volume()).anomaly_map, 0.02)
    with pytest.raises(FileNotFoundError, match="network holds no pipeline"):
        AnomalyPipeline.from_pretrained("network")
    list_models(["network"])
    card = capsys.readouterr().out
    assert "A `DAEUNet2DModel` of anodiff" in card and "no scan of anybody was seen" in card
    assert publish(["--owner", "lab", "network"]) == 0
    assert set(near_hub.files("lab/network")) - {".gitattributes"} == {
        *("README.md", "NOTICE", "shipped.json", "config.json", "diffusion_pytorch_model.safetensors"),
    }
    # Nothing that finds anomalies is chosen.
    with pytest.raises(ValueError, match="their modalities are none"):
        shipped.choose_shipped(None)


def test_all_are_published_whole_and_a_failure_is_made_up_for(checkpoints, near_hub, capsys):
    near_hub.fail("POST", "/api/models/lab/tiny-flair/commit/", status=403, times=1)
    assert publish(["--owner", "lab"]) == 1
    said = capsys.readouterr()
    assert f"tiny-any: {near_hub.url}/lab/tiny-any\n" in said.out and "tiny-flair" not in said.out
    assert "FAILED tiny-flair: lab/tiny-flair was not pushed: " in said.err
    assert said.err.endswith("Not pushed: tiny-flair. The same command goes on.\n")
    before = {name: near_hub.repositories["model", f"lab/{name}"].head for name in ("tiny-any", "tiny-t1")}
    near_hub.requests.clear()
    assert publish(["--owner", "lab"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        *("tiny-any", "tiny-flair", "tiny-t1"),
    ]
    assert sum(request.startswith("PUT /lfs/") for request in near_hub.requests) <= 1
    assert before == {name: near_hub.repositories["model", f"lab/{name}"].head for name in before}
    for name in ("tiny-flair", "tiny-t1"):
        pushed = near_hub.files(f"lab/{name}")
        # In float16, as they are here.
        (there,) = [content for file, content in pushed.items() if file.endswith(".safetensors")]
        owner = {"tiny-t1": "tiny-any"}.get(name, name)
        assert there == next((checkpoints / owner).glob("unet/*.safetensors")).read_bytes()
        assert json.loads(pushed["shipped.json"])["shares"] == {}
        card = pushed["README.md"].decode()
        assert (
            f'from_pretrained("lab/{name}")' in card
            and f"--model lab/{name} scan" in card
            and "license: apache-2.0" in card
        )
        assert b"BBillot/SynthSeg" in pushed["NOTICE"]
        pipes = [AnomalyPipeline.from_pretrained(source) for source in (f"lab/{name}", name)]
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
        assert_same_map(*(pipe(make_volume()).anomaly_map for pipe in pipes), 1e-6)


def test_a_card_that_was_changed_on_the_hub_stays(checkpoints, near_hub, capsys):
    assert publish(["--owner", "lab", "tiny-any"]) == 0
    assert ("model", "lab/tiny-flair") not in near_hub.repositories
    mine = near_hub.files("lab/tiny-any")["README.md"].replace(b"# tiny-any", b"# My own")
    near_hub.put("lab/tiny-any", {"README.md": mine})
    assert publish(["--owner", "lab", "tiny-any"]) == 0
    assert "The card of lab/tiny-any was changed there: it stays." in capsys.readouterr().err
    assert near_hub.files("lab/tiny-any")["README.md"] == mine
    with pytest.raises(ValueError, match="`names` must be one of tiny-any, tiny-flair, tiny-t1, got 'tiny'"):
        publish(["--owner", "lab", "tiny"])
    with pytest.raises(ValueError, match="`--owner` is missing"):
        publish([])


def test_the_space_is_pushed_whole_and_its_card_stays_if_it_was_changed(near_hub, tmp_path, capsys):
    assert publish(["--owner", "lab", "--space"]) == 0
    assert capsys.readouterr().out == f"anodiff: {near_hub.url}/spaces/lab/anodiff\n"
    assert list(near_hub.repositories) == [("space", "lab/anodiff")]
    pushed = near_hub.files("lab/anodiff", "space")

    card = ModelCard(pushed["README.md"].decode()).data.to_dict()
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert card["sdk"] == "gradio" and f"gradio=={card['sdk_version']}" in pinned
    assert card["app_file"] in pushed and card["license"] == "apache-2.0"
    # What has to be installed there: ours lies beside the page, and gradio is the Hub's business.
    required = pushed["requirements.txt"].decode().splitlines()
    assert {"torch", "diffusers", "nilearn"} <= {line.split()[0] for line in required}
    assert not [line for line in required if line.startswith(("gradio", "anodiff", "#"))]
    assert not [name for name in pushed if "tests/" in name or "__pycache__" in name]

    # It starts with nothing of ours but what was pushed.
    for name, content in pushed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    code = (
        "import app, anodiff; from anodiff.hub.shipped import list_shipped; print(anodiff.__path__, *list_shipped())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout.split() == [f"['{tmp_path / 'anodiff'}']", *shipped.list_shipped()], done.stderr

    mine = pushed["README.md"].replace(b"# anodiff", b"# Our anodiff")
    near_hub.put("lab/anodiff", {"README.md": mine}, "space")
    assert publish(["--owner", "lab", "--space"]) == 0
    assert near_hub.files("lab/anodiff", "space")["README.md"] == mine
    assert "The card of lab/anodiff was changed there: it stays." in capsys.readouterr().err
