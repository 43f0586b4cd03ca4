"""What `from_pretrained` says to repositories and folders that it cannot load, and how those that it can are loaded."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import anodiff
from anodiff import AnoDDPMPipeline, AnomalyPipeline, VolumeProcessor
from anodiff.hub.model_card import make_card
from anodiff.hub.publishing import complete_folder

from ..tiny import make_pipeline, make_unet


LOAD = """
import json, sys
from anodiff import AnoDDPMPipeline, AnomalyPipeline

answers = []
for source, arguments in json.loads(sys.argv[1]):
    for pipeline_class in (AnomalyPipeline, AnoDDPMPipeline):
        try:
            answers.append(type(pipeline_class.from_pretrained(source, **arguments)).__name__)
        except (OSError, ValueError) as error:
            answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


@pytest.fixture
def folder(tmp_path):
    pipeline = make_pipeline("AnoDDPMPipeline", ("flair",), noise_level=2)
    pipeline.save_pretrained(tmp_path / "pipeline")
    complete_folder(tmp_path / "pipeline", str(make_card(pipeline)))
    return tmp_path / "pipeline"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(hub_client, *sources, **variables):
    """Pairs of answers: of the base class, of the class itself."""
    asked = [source if isinstance(source, tuple) else (source, {}) for source in sources]
    answers = hub_client(LOAD, json.dumps(asked), **variables)
    return list(zip(answers[::2], answers[1::2], strict=True))


def newer(card: bytes) -> bytes:
    written = f"anodiff_version: {anodiff.__version__}".encode()
    assert written in card
    return card.replace(written, b"anodiff_version: 99.1.0")


def test_what_is_no_pipeline_of_ours(hub, hub_client, folder, tmp_path):
    hub.put("owner/notes", {"README.md": b"# Notes"})
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    hub.put("owner/ddpm", contents(tmp_path / "ddpm"))
    hub.put("owner/tiny", contents(folder))
    missing, notes, ddpm, name, revision = load(
        hub_client, "owner/missing", "owner/notes", "owner/ddpm", "no such folder", ("owner/tiny", {"revision": "v9"})
    )
    for answer in missing:
        assert answer.startswith("FileNotFoundError: There is neither a folder nor a Hub repository owner/missing.")
    for answer in notes:
        assert answer.startswith(
            "FileNotFoundError: owner/notes holds no pipeline: there is no model_index.json in it."
        )
    assert "ValueError: owner/ddpm holds a DDPMPipeline, which is no pipeline of anodiff" in ddpm[0]
    assert "ValueError: owner/ddpm holds a DDPMPipeline, not a AnoDDPMPipeline" in ddpm[1]
    assert "There is no folder no such folder, and it is no id of the Hub" in name[0]
    assert "owner/tiny has no revision 'v9'" in revision[0]


def test_private_and_unreachable_repositories(hub, hub_client, folder):
    hub.put("owner/secret", contents(folder))
    hub.repositories["model", "owner/secret"].private = True
    [(base, _)] = load(hub_client, "owner/secret", HF_TOKEN="")
    assert "neither a folder nor a Hub repository owner/secret. If it is private, log in" in base
    [(base, _)] = load(hub_client, "owner/secret", HF_HUB_OFFLINE="1")
    assert "the Hub cannot be reached (or HF_HUB_OFFLINE is set)" in base
    assert load(hub_client, "owner/secret") == [("AnoDDPMPipeline", "AnoDDPMPipeline")]
    hub.requests.clear()
    assert load(hub_client, "owner/secret", HF_HUB_OFFLINE="1") == [("AnoDDPMPipeline", "AnoDDPMPipeline")]
    assert hub.requests == []


def test_a_pipeline_without_processor(hub, hub_client, folder):
    files = contents(folder)
    files.pop("processor/processor_config.json")
    hub.put("owner/lost", files)
    index = json.loads(files["model_index.json"])
    hub.put("owner/never", {**files, "model_index.json": json.dumps(index | {"processor": [None, None]}).encode()})
    for answers in load(hub_client, "owner/lost", "owner/never"):
        for answer in answers:
            assert "has no processor, so nobody can know which modalities, size and intensities" in answer

    (folder / "processor" / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="has no processor"):
        AnomalyPipeline.from_pretrained(folder)
    # Somebody who knows it may give it.
    processor = VolumeProcessor(modalities=("flair",), size=(16, 16))
    assert AnomalyPipeline.from_pretrained(folder, processor=processor).processor is processor


def test_a_pipeline_of_a_newer_version(hub, hub_client, folder):
    files = contents(folder)
    hub.put("owner/newer", files | {"README.md": newer(files["README.md"])})
    for answer in load(hub_client, "owner/newer")[0]:
        assert "owner/newer was made by anodiff 99.1.0" in answer and "pip install 'anodiff>=99.1.0'" in answer

    # The next patch changes no format; a card that says nothing, and no card at all, are no obstacle.
    major, minor, patch = map(int, anodiff.__version__.split(".")[:3])
    card = (folder / "README.md").read_text()
    for text in (card.replace(anodiff.__version__, f"{major}.{minor}.{patch + 1}"), "# Mine\n", None):
        (folder / "README.md").unlink()
        if text is not None:
            (folder / "README.md").write_text(text)
        assert type(AnomalyPipeline.from_pretrained(folder)) is AnoDDPMPipeline
        (folder / "README.md").write_text("")
    (folder / "README.md").write_bytes(newer(card.encode()))
    with pytest.raises(ValueError, match="was made by anodiff 99.1.0"):
        AnoDDPMPipeline.from_pretrained(folder)


DTYPES = """
import json, sys
import torch
from anodiff import AnomalyPipeline

slices = torch.rand(2, 1, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
maps = {}
for name, arguments in {
    "full": {},
    "bf16": {"dtype": torch.bfloat16},
    "stored half": {"dtype": torch.float16, "variant": "fp16"},
    "placed": {"device_map": "cpu"},
}.items():
    pipeline = AnomalyPipeline.from_pretrained(sys.argv[1], **arguments)
    pipeline.set_progress_bar_config(disable=True)
    dtype = str(pipeline.unet.dtype)
    result = pipeline.to("cpu")(slices).anomaly_map
    maps[name] = [dtype, str(result.dtype), result.flatten().tolist()]
print(json.dumps(maps))
"""


def test_dtype_variant_and_device(hub, hub_client, folder):
    pipeline = AnoDDPMPipeline.from_pretrained(folder)
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    hub.put("owner/tiny", contents(folder))
    answers = hub_client(DTYPES, "owner/tiny")
    assert [dtype for dtype, _, _ in answers.values()] == [
        "torch.float32", "torch.bfloat16", "torch.float16", "torch.float32",
    ]  # fmt: skip
    full = torch.tensor(answers["full"][2])
    assert full.max() > 0
    for name, tolerance in (("bf16", 0.05), ("stored half", 0.01), ("placed", 1e-6)):
        assert answers[name][1] == "torch.float32"
        torch.testing.assert_close(torch.tensor(answers[name][2]), full, atol=tolerance * full.max().item(), rtol=0)
