"""A Hub that stumbles, is silent, or breaks off: what is asked again, how often, and what is said in the end."""

import json
import threading

import httpx2
import pytest
from huggingface_hub import HfApi

from anodiff import AnoDDPMPipeline, AnomalyPipeline
from anodiff.hub import connection
from anodiff.hub.publishing import PublishingError, complete_folder, open_repository, push_folder, read_card

from ..tiny import make_pipeline


CARD = "---\nlicense: mit\n---\n\n# Tiny\n"
REQUESTS = {
    "create": ("POST", "/api/repos/create"),
    "right to write": ("GET", "/auth-check/write"),
    "visibility": ("GET", "/api/models/owner/tiny$"),
    "card": ("HEAD", "/resolve/.*README.md"),
    "text of the card": ("GET", "/resolve/.*README.md"),
    "files to send": ("POST", "/preupload/"),
    "large files": ("POST", "/info/lfs/objects/batch"),
    "a large file": ("PUT", "/lfs/"),
    "its check": ("POST", "/lfs/verify"),
    "commit": ("POST", "/commit/"),
}
FAILURES = {
    "too many requests": {"status": 429, "headers": {"Retry-After": "7"}},
    "out of service": {"status": 503},
    "cut": {"status": None},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.safetensors").write_bytes(b"weights")
    return tmp_path / "folder"


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline("AnoDDPMPipeline", ("flair",), noise_level=2, threshold=0.5)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(hub, pipeline, tmp_path, name="owner/tiny"):
    pipeline.save_pretrained(tmp_path / "to-put")
    complete_folder(tmp_path / "to-put", CARD)
    hub.put(name, contents(tmp_path / "to-put"))


def count(hub, method, path):
    return sum(request.startswith(method) and path.strip("$").split(".*")[-1] in request for request in hub.requests)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("request_name", REQUESTS)
def test_one_stumble_ends_no_push(near_hub, folder, request_name, failure):
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})
    near_hub.repositories["model", "owner/tiny"].private = True
    method, path = REQUESTS[request_name]
    near_hub.fail(method, path, times=1, **FAILURES[failure])
    push_folder(folder, "owner/tiny", private=True, make_card=lambda there: f"{there}More.\n")
    assert near_hub.failures[0].remaining == 0 and count(near_hub, method, path) >= 2
    pushed = near_hub.files("owner/tiny")
    assert pushed["weights.safetensors"] == b"weights" and pushed["README.md"].decode() == f"{CARD}More.\n"
    # The wait that the server asks for, or one of ours. (huggingface_hub asks for the state of a file twice at once.)
    assert request_name == "card" or (near_hub.waited and failure != "too many requests") or max(near_hub.waited) >= 7


def test_a_licence_is_checked_in_spite_of_a_stumble(near_hub):
    near_hub.fail("POST", "/api/validate-yaml", status=502, times=1)
    assert open_repository("owner/tiny", licence="mit").endswith("owner/tiny")


def test_a_hub_out_of_service_is_asked_five_times(near_hub, folder):
    near_hub.fail("POST", "/api/repos/create", status=503)
    with pytest.raises(PublishingError, match="was not pushed: HfHubHTTPError.*503"):
        push_folder(folder, "owner/tiny")
    assert count(near_hub, "POST", "/api/repos/create") == 5 and near_hub.waited == [1, 2, 4, 8]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_a_hub_that_refuses_is_asked_once(near_hub, folder, status):
    near_hub.fail("POST", "/commit/", status=status)
    with pytest.raises(PublishingError, match="This failure was asked for"):
        push_folder(folder, "owner/tiny")
    assert count(near_hub, "POST", "/commit/") == 1 and near_hub.waited == []


def test_a_server_asks_for_minutes_at_most(near_hub, caplog):
    near_hub.fail("POST", "/api/repos/create", status=429, headers={"Retry-After": "100000000"}, times=1)
    open_repository("owner/tiny")
    assert near_hub.waited == [connection.LONGEST_WAIT]
    assert caplog.messages == ["The Hub stumbles (HfHubHTTPError): it is asked again in 300 s."]


@pytest.mark.parametrize("request_name", ["create", "right to write", "visibility", "card", "commit"])
def test_no_push_waits_for_ever(near_hub, folder, request_name, monkeypatch):
    monkeypatch.setitem(connection.TIME_LIMITS, "read", 0.1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})
    method, path = REQUESTS[request_name]
    near_hub.fail(method, path, silent=True, times=1)
    push_folder(folder, "owner/tiny", make_card=lambda there: there)
    assert count(near_hub, method, path) >= 2
    near_hub.fail("POST", "/api/repos/create", silent=True)
    with pytest.raises(PublishingError, match="timed out"):
        open_repository("owner/other")


def test_a_limit_that_is_given_counts(near_hub, monkeypatch):
    monkeypatch.setitem(connection.TIME_LIMITS, "read", 0.1)
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})
    # An answer that takes longer than our limit, and less than that of the caller.
    near_hub.fail("GET", "/api/models/owner/tiny", silent=True, times=1)
    threading.Timer(0.5, near_hub.stopped.set).start()
    with pytest.raises(httpx2.RemoteProtocolError):
        HfApi().repo_info("owner/tiny", timeout=30)


def test_no_load_waits_for_ever(near_hub, pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(connection.TIME_LIMITS, "read", 0.1)
    put(near_hub, pipeline, tmp_path)
    near_hub.fail("GET", "/api/models/owner/tiny", silent=True)
    with pytest.raises(ConnectionError, match="from owner/tiny broke off again and again, .*timed out"):
        AnomalyPipeline.from_pretrained("owner/tiny")


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("path", ["/api/models/owner/tiny", "/resolve/.*model_index.json", "/resolve/.*safetensors"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_one_stumble_ends_no_load(near_hub, pipeline, tmp_path, path, failure, method):
    put(near_hub, pipeline, tmp_path)
    near_hub.fail(method, path, times=1, **FAILURES[failure])
    assert type(AnomalyPipeline.from_pretrained("owner/tiny")) is AnoDDPMPipeline


def test_weights_that_are_cut_again_and_again(near_hub, pipeline, tmp_path):
    put(near_hub, pipeline, tmp_path)
    near_hub.fail("GET", "safetensors", status=None, after=0)
    with pytest.raises(ConnectionError) as raised:
        AnomalyPipeline.from_pretrained("owner/tiny")
    text = str(raised.value)
    assert "The download of unet/diffusion_pytorch_model.safetensors from owner/tiny broke off" in text
    # One line, and no chain of the errors of every try.
    assert "\n" not in text and raised.value.__cause__ is None and raised.value.__suppress_context__
    # What is cut in the middle only sometimes is put together.
    near_hub.failures.clear()
    near_hub.fail("GET", "safetensors", status=None, after=1000, times=3)
    assert AnomalyPipeline.from_pretrained("owner/tiny").config.threshold == 0.5


# Cards


def test_a_card_is_none_only_where_there_is_none(near_hub):
    near_hub.put("owner/tiny", {"a.txt": b"a"})
    assert read_card("owner/tiny") is None and read_card("owner/nothing") is None
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})
    assert read_card("owner/tiny") == CARD
    # The cache knows the earlier one.
    near_hub.put("owner/tiny", {"README.md": b"# Newer\n"})
    assert read_card("owner/tiny") == "# Newer\n"


@pytest.mark.parametrize("status", [403, 500, 503, None])
@pytest.mark.parametrize(("method", "path"), [REQUESTS["visibility"], REQUESTS["card"], REQUESTS["text of the card"]])
def test_a_card_that_cannot_be_read_is_not_replaced(near_hub, folder, method, path, status):
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})
    (folder / "README.md").write_text("# Of the folder\n")
    near_hub.fail(method, path, status=status)
    with pytest.raises(PublishingError, match="--exclude README.md"):
        push_folder(folder, "owner/tiny", make_card=lambda there: there or "# Bare\n")
    assert near_hub.files("owner/tiny")["README.md"].decode() == CARD
    assert "weights.safetensors" not in near_hub.files("owner/tiny")
    assert (folder / "README.md").read_text() == "# Of the folder\n"


def test_a_card_of_a_data_set_that_somebody_wrote_stays(near_hub, folder, capsys):
    (folder / "README.md").write_text("# Made\n")
    push_folder(folder, "owner/rows", repo_type="dataset")
    near_hub.put("owner/rows", {"README.md": CARD.encode()}, repo_type="dataset")
    (folder / "weights.safetensors").write_bytes(b"others")
    push_folder(folder, "owner/rows", repo_type="dataset")
    files = near_hub.files("owner/rows", "dataset")
    assert (files["README.md"].decode(), files["weights.safetensors"]) == (CARD, b"others")
    assert f"The card that owner/rows has stays. For that of this data set: {folder / 'README.md'}." in (
        capsys.readouterr().err
    )
    assert (folder / "README.md").read_text() == "# Made\n"


def test_a_card_that_is_not_utf8_is_not_replaced(near_hub, folder):
    near_hub.put("owner/tiny", {"README.md": b"# M\xfcller\n"})
    with pytest.raises(PublishingError, match="not UTF-8"):
        push_folder(folder, "owner/tiny", make_card=lambda there: there or "# Bare\n")
    assert near_hub.files("owner/tiny")["README.md"] == b"# M\xfcller\n"


def test_a_card_that_is_changed_meanwhile(near_hub, folder):
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})

    def make_card(there):
        if "Edited" not in there:
            near_hub.put("owner/tiny", {"README.md": f"{CARD}Edited.\n".encode()})
        return f"{there}Results.\n"

    push_folder(folder, "owner/tiny", make_card=make_card)
    assert near_hub.files("owner/tiny")["README.md"].decode() == f"{CARD}Edited.\nResults.\n"

    def edit_always(there):
        near_hub.put("owner/tiny", {"README.md": f"{there}Again.\n".encode()})
        return "# Lost\n"

    with pytest.raises(PublishingError, match="412"):
        push_folder(folder, "owner/tiny", make_card=edit_always)
    assert b"Lost" not in near_hub.files("owner/tiny")["README.md"]


def test_cards_of_pipelines(near_hub, pipeline, tmp_path):
    near_hub.put("owner/tiny", {"README.md": CARD.encode()})
    near_hub.fail("HEAD", "README.md", status=503)
    with pytest.raises(PublishingError, match="is not to be lost"):
        pipeline.push_to_hub("owner/tiny")
    near_hub.failures.clear()
    pipeline.push_to_hub("owner/tiny")
    assert near_hub.files("owner/tiny")["README.md"].decode() == CARD
    pipeline.push_to_hub("owner/tiny", card="---\nlicense: mit\n---\n\n# Said so\n")
    assert "# Said so" in near_hub.files("owner/tiny")["README.md"].decode()

    # A folder with a card of its own: neither of the two is lost.
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text(CARD.replace("Tiny", "Mine"))
    with pytest.raises(PublishingError, match="mine/README.md and the card of owner/tiny differ"):
        pipeline.save_pretrained(folder, push_to_hub=True, repo_id="owner/tiny")
    assert "# Said so" in near_hub.files("owner/tiny")["README.md"].decode()
    assert "# Mine" in (folder / "README.md").read_text()
    pipeline.save_pretrained(folder, push_to_hub=True, repo_id="owner/new")
    assert "# Mine" in near_hub.files("owner/new")["README.md"].decode()


# What was saved


def alter(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "name",
    ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "processor/processor_config.json"],
)
def test_altered_files_of_the_same_size(near_hub, pipeline, tmp_path, name):
    put(near_hub, pipeline, tmp_path)
    _, files = near_hub.repositories["model", "owner/tiny"].resolve("main")
    oid = files[name][0]
    if name.endswith(".json"):
        near_hub.blobs[oid] = near_hub.blobs[oid].replace(b'"_diffusers_version": "0', b'"_diffusers_version": "1')
    else:
        near_hub.blobs[oid] = alter(near_hub.blobs[oid])
    with pytest.raises(ValueError, match=f"{name} of owner/tiny is not the file that was saved"):
        AnomalyPipeline.from_pretrained("owner/tiny")
    folder = tmp_path / "to-put"
    (folder / name).write_bytes(near_hub.blobs[oid])
    with pytest.raises(ValueError, match=f"{name} of {folder} is not the file that was saved"):
        AnoDDPMPipeline.from_pretrained(folder)
    # Its own component in its place: the file is not read.
    component = name.split("/")[0]
    given = {component: getattr(pipeline, component)}
    assert AnoDDPMPipeline.from_pretrained(folder, **given).config.threshold == 0.5


def test_what_may_be_edited(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    complete_folder(tmp_path, CARD)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert set(index["_sha256"]) == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "processor/processor_config.json",
    }
    (tmp_path / "README.md").write_text(f"{CARD}By hand.\n")
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"threshold": 0.25}))
    assert AnomalyPipeline.from_pretrained(tmp_path).config.threshold == 0.25
    # Of an earlier version, which knew no sums.
    del index["_sha256"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "_sha256" not in AnomalyPipeline.from_pretrained(tmp_path).config
    complete_folder(tmp_path, CARD)
    assert "unet/config.json" in json.loads((tmp_path / "model_index.json").read_text())["_sha256"]


def test_sums_of_a_variant(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    full, half = (tmp_path / "unet" / f"diffusion_pytorch_model{middle}.safetensors" for middle in ("", ".fp16"))
    sums = json.loads((tmp_path / "model_index.json").read_text())["_sha256"]
    assert {f"unet/{path.name}" for path in (full, half)} <= set(sums)
    full.write_bytes(alter(full.read_bytes()))
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors of"):
        AnomalyPipeline.from_pretrained(tmp_path)
    # Only a part of the repository was fetched.
    full.unlink()
    assert AnomalyPipeline.from_pretrained(tmp_path, variant="fp16").config.threshold == 0.5


@pytest.mark.parametrize("index", ["[]", "{", '{"_class_name": "AnoDDPMPipeline", "_sha256": []}'])
def test_a_damaged_index_is_named(pipeline, tmp_path, index):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match="model_index.json.*damaged"):
        AnomalyPipeline.from_pretrained(tmp_path)
    # A save repairs it.
    pipeline.save_pretrained(tmp_path)
    assert AnomalyPipeline.from_pretrained(tmp_path).config.threshold == 0.5


def test_a_save_that_is_interrupted_keeps_the_earlier_one(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    other = make_pipeline("AnoDDPMPipeline", ("flair",), noise_level=3, threshold=0.7)
    next(other.unet.parameters()).data += 1

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(other.processor), "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(tmp_path)
    assert contents(tmp_path) == before

    # Between two files: the pipeline is of two saves, and nobody gets it without being told.
    moved, replace = [], type(tmp_path).replace

    def stop_at_the_index(path, target):
        if path.name == "model_index.json":
            raise KeyboardInterrupt
        moved.append(path)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", stop_at_the_index)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(tmp_path)
    assert moved
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors .* is not the file"):
        AnomalyPipeline.from_pretrained(tmp_path)

    # The next save removes what a killed one has left, and nothing else.
    (tmp_path / ".abc.partial.pipeline" / "unet").mkdir(parents=True)
    other.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == set(before) and not (tmp_path / ".abc.partial.pipeline").exists()
    assert AnomalyPipeline.from_pretrained(tmp_path).config.threshold == 0.7
