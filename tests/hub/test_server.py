"""The local Hub itself, through huggingface_hub and datasets as they are, and by bare requests where the protocol matters."""

import json
import urllib.error
import urllib.request

import pytest

from ..hub_server import TOKEN, check_card


LIFE_OF_A_REPOSITORY = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

api, folder, seen = HfApi(), Path(sys.argv[1]), {}
seen["user"] = api.whoami()["name"]
url = api.create_repo("owner/thing")
seen["url"], seen["again"] = url, api.create_repo("owner/thing", exist_ok=True)
try:
    api.create_repo("owner/thing")
except errors.HfHubHTTPError as error:
    seen["twice"] = error.response.status_code
first = api.upload_folder(repo_id="owner/thing", folder_path=folder)
seen["unchanged"] = api.upload_folder(repo_id="owner/thing", folder_path=folder).oid == first.oid
seen["files"] = api.list_repo_files("owner/thing")
api.create_tag("owner/thing", tag="v1")
api.upload_file(repo_id="owner/thing", path_or_fileobj=b"second", path_in_repo="text/a.txt")
api.delete_file("weights.safetensors", "owner/thing")
seen["main"] = Path(hf_hub_download("owner/thing", "text/a.txt")).read_text()
seen["v1"] = Path(hf_hub_download("owner/thing", "text/a.txt", revision="v1")).read_text()
snapshot = Path(snapshot_download("owner/thing", revision="v1"))
seen["same"] = all((snapshot / f.relative_to(folder)).read_bytes() == f.read_bytes() for f in folder.rglob("*.*"))
seen["commits"] = [commit.title for commit in api.list_repo_commits("owner/thing")]
seen["tags"] = [(tag.name, tag.target_commit == first.oid) for tag in api.list_repo_refs("owner/thing").tags]
seen["paths"] = [path.path for path in api.get_paths_info("owner/thing", ["text", "text/a.txt", "nothing"])]
for name, call in {
    "file": lambda: hf_hub_download("owner/thing", "nothing.txt"),
    "revision": lambda: hf_hub_download("owner/thing", "text/a.txt", revision="v9"),
    "repository": lambda: hf_hub_download("owner/nothing", "a.txt"),
}.items():
    try:
        call()
    except Exception as error:
        seen[name] = type(error).__name__
api.create_repo("owner/secret", private=True)
seen["private"] = [api.repo_exists("owner/secret"), HfApi(token=False).repo_exists("owner/secret")]
api.delete_repo("owner/thing")
seen["exists"] = api.repo_exists("owner/thing")
print(json.dumps(seen))
"""

LIFE_OF_A_DATA_SET = """
import json
import numpy as np
from datasets import Dataset, load_dataset

rows = Dataset.from_dict({"slice": list(range(300)), "image": np.zeros((300, 4, 4), np.float32) + np.arange(300)[:, None, None]})
rows.push_to_hub("owner/rows", split="train")
back = load_dataset("owner/rows", split="train")
streamed = load_dataset("owner/rows", split="train", streaming=True)
print(json.dumps([back.num_rows, back[299]["image"][3][3], [row["slice"] for row in streamed.take(3)]]))
"""


def test_life_of_a_repository(hub, hub_client, tmp_path):
    folder = tmp_path / "thing"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.txt").write_text("first")
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / ".eval.yaml").write_text("[]")
    seen = hub_client(LIFE_OF_A_REPOSITORY, folder)
    assert seen == {
        "user": "owner",
        "url": f"{hub.url}/owner/thing",
        "again": f"{hub.url}/owner/thing",
        "twice": 409,
        "unchanged": True,
        "files": [".eval.yaml", ".gitattributes", "text/a.txt", "weights.safetensors"],
        "main": "second",
        "v1": "first",
        "same": True,
        "commits": [
            "Delete weights.safetensors with huggingface_hub",
            "Upload text/a.txt with huggingface_hub",
            "Upload folder using huggingface_hub",
            "initial commit",
        ],
        "tags": [["v1", True]],
        "paths": ["text", "text/a.txt"],
        "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
        "repository": "RepositoryNotFoundError",
        "private": [True, False],
        "exists": False,
    }
    uploads = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert len(uploads) == 1  # the weights, once; text goes with the commit


def test_life_of_a_data_set(hub, hub_client):
    assert hub_client(LIFE_OF_A_DATA_SET) == [300, 299.0, [0, 1, 2]]
    assert any(path.endswith(".parquet") for path in hub.files("owner/rows", "dataset"))


def request(hub, method, path, headers=None, body=None):
    """Status, headers and body of one request with the token."""
    headers = {"Authorization": f"Bearer {TOKEN}", **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(hub.url + path, body, headers, method=method)) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.mark.parametrize(
    ("wanted", "status", "body", "content_range"),
    [
        (None, 200, b"0123456789", None),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ],
)
def test_parts_of_a_file(hub, wanted, status, body, content_range):
    hub.put("owner/thing", {"a.npz": b"0123456789"})
    answer = request(hub, "GET", "/owner/thing/resolve/main/a.npz", {"Range": wanted} if wanted else {})
    assert (answer[0], answer[2], answer[1]["Content-Range"]) == (status, body, content_range)


def test_headers_of_large_and_small_files(hub):
    commit = hub.put("owner/thing", {"a.npz": b"large", "b.txt": b"small"})
    _, large, body = request(hub, "HEAD", "/owner/thing/resolve/main/a.npz")
    assert (large["X-Repo-Commit"], large["X-Linked-Size"], large["Content-Length"], body) == (commit, "5", "5", b"")
    assert large["ETag"] == large["X-Linked-Etag"]
    _, small, _ = request(hub, "HEAD", "/owner/thing/resolve/main/b.txt")
    assert small["X-Linked-Etag"] is None
    assert small["ETag"] == '"64c3ecd7abb014643a372e0155b41cfca014c01f"'  # printf small | git hash-object --stdin


def test_folders_are_listed_and_missing_ones_are_not_found(hub):
    hub.put("owner/thing", {"unet/config.json": b"{}", "README.md": b"# thing"})
    tree = json.loads(request(hub, "GET", "/api/models/owner/thing/tree/main")[2])
    assert [(entry["type"], entry["path"]) for entry in tree] == [
        ("file", ".gitattributes"),
        ("file", "README.md"),
        ("directory", "unet"),
    ]
    tree = json.loads(request(hub, "GET", "/api/models/owner/thing/tree/main?recursive=true")[2])
    assert [entry["path"] for entry in tree] == [".gitattributes", "README.md", "unet", "unet/config.json"]
    status, headers, _ = request(hub, "GET", "/api/models/owner/thing/tree/main/vae")
    assert (status, headers["X-Error-Code"]) == (404, "EntryNotFound")


def test_writing_needs_the_token(hub):
    hub.put("owner/thing", {"a.txt": b"a"})
    body = json.dumps({"name": "new", "organization": "owner"}).encode()
    wrong = {"Authorization": "Bearer hf_other"}
    assert request(hub, "POST", "/api/repos/create", wrong, body)[0] == 401
    assert request(hub, "POST", "/api/models/owner/thing/commit/main", wrong, b"")[0] == 401
    assert request(hub, "GET", "/owner/thing/resolve/main/a.txt", wrong)[2] == b"a"
    assert ("model", "owner/new") not in hub.repositories


def test_content_that_does_not_match_its_sum_is_refused(hub):
    assert request(hub, "PUT", "/lfs/" + "0" * 64, body=b"damaged")[0] == 400
    assert hub.blobs == {}


def test_failures_on_demand(hub):
    hub.put("owner/thing", {"a.txt": b"a"})
    path = "/owner/thing/resolve/main/a.txt"
    hub.fail("GET", r"/resolve/", status=503, times=1)
    assert [request(hub, "GET", path)[0] for _ in range(2)] == [503, 200]
    hub.fail("GET", r"/resolve/", status=None)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            request(hub, "GET", path)
    assert request(hub, "HEAD", path)[0] == 200
    hub.failures.clear()
    assert request(hub, "GET", path)[0] == 200


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ("license: my-own", "license"),
        ("license: other\nlicense_name: My Own", "license_name"),
        ("tags: mri", "tags"),
        ("tags: [1]", "tags"),
        ("a: [", "YAML"),
        ("model-index: [{name: a, results: [{task: {type: b}, metrics: []}]}]", "dataset.type"),
        (
            "model-index: [{name: a, results: [{task: {type: b}, dataset: {type: c, name: c}, metrics: [{type: d}]}]}]",
            "value",
        ),
    ],
)
def test_wrong_metadata_of_a_card(metadata, word):
    errors, _ = check_card(f"---\n{metadata}\n---\n# Card\n", "model")
    assert len(errors) == 1 and word in errors[0]
    assert check_card("---\nlicense: mit\ntags: [mri]\n---\n# Card\n", "model") == ([], [])
