"""A Hub on this machine: create, push, pull, tag and delete repositories over real HTTP, without an account.

python tests/hub_server.py --port 8765

It speaks the part of the Hub's protocol that huggingface_hub, diffusers and datasets use, and keeps everything in memory
until it stops. Tests make it fail on demand (`HubServer.fail`). Standard library only, except for the YAML of cards.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml


TOKEN = "hf_local"
READ_TOKEN = "hf_local_read"
# What the Hub's .gitattributes declares as large, and the size above which everything is.
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".npz", ".png", ".gz", ".zip", ".arrow")
LFS_SIZE = 10 * 2**20
# A part of the Hub's list; another identifier is an error there as well.
LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-3.0", "odbl", "unknown", "other",
)  # fmt: skip
PLURALS = {"models": "model", "datasets": "dataset", "spaces": "space"}
# Before the id of a repository in addresses.
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


@dataclass
class Repository:
    """Commits, the oldest first, each with all its files `{path: (oid, is_lfs)}`; branches and tags point at them."""

    repo_type: str
    repo_id: str
    private: bool
    commits: list[tuple[str, str, dict]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: dict) -> str:
        sha = hashlib.sha1(f"{self.repo_type}/{self.repo_id}/{len(self.commits)}/{title}/{files}".encode()).hexdigest()
        self.commits.append((sha, title, files))
        return sha

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def resolve(self, revision: str) -> tuple[str, dict] | None:
        """Commit and files of a branch, tag or commit; `None` for no such revision."""
        wanted = self.head if revision in ("main", "refs/heads/main") else self.tags.get(revision, revision)
        return next(((sha, files) for sha, _, files in self.commits if sha == wanted), None)


@dataclass
class Failure:
    """An answer that tests ask for: `status`, or a connection that is cut without one, or after so many bytes of the
    content; or none at all."""

    method: str
    path: re.Pattern
    status: int | None
    remaining: int | None
    headers: dict[str, str]
    after: int | None
    silent: bool


class HubServer:
    """
    The server, in a thread of its own; a context manager.

    Args:
        port (`int`): Port on 127.0.0.1; 0 takes a free one.

    Attributes:
        url (`str`): What `HF_ENDPOINT` must be.
        requests (`list[str]`): `"METHOD /path"` of every request so far.
        repositories (`dict`): `(repo_type, repo_id)` to [`Repository`].
    """

    def __init__(self, port: int = 0):
        self.requests: list[str] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables of a client process; they are read when huggingface_hub is imported. `home` is its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            # With Xet a server that does not speak it is a fatal error of every upload of a large file.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def fail(
        self,
        method: str,
        path: str,
        *,
        status: int | None = 500,
        times: int | None = None,
        headers: dict[str, str] | None = None,
        after: int | None = None,
        silent: bool = False,
    ) -> None:
        """Answers requests of `method` whose path matches the regular expression `path` with `status` and `headers`; cuts the
        connection for `None`, without an answer or `after` so many bytes of the content; or says nothing, `silent`. `times` of
        them, or all until `failures.clear()`."""
        self.failures.append(Failure(method, re.compile(path), status, times, headers or {}, after, silent))

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        _, files = self.repositories[repo_type, repo_id].resolve(revision)
        return {path: self.blobs[oid] for path, (oid, _) in files.items()}

    def put(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model") -> str:
        """Commits files without a client, into a new repository if need be; returns the commit."""
        with self.lock:
            repository = self.repositories.get((repo_type, repo_id)) or self.create(repo_type, repo_id, False)
            entries = {path: (self.store(content), path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
            return repository.commit("put", {**repository.commits[-1][2], **entries})

    def create(self, repo_type: str, repo_id: str, private: bool) -> Repository:
        repository = Repository(repo_type, repo_id, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.commit("initial commit", {".gitattributes": (self.store(attributes.encode()), False)})
        self.repositories[repo_type, repo_id] = repository
        return repository

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid


class _Error(Exception):
    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One packet per answer, at once: otherwise the client's delayed acknowledgement costs 40 ms per request.
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        self.hub: HubServer = self.server.hub
        split = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(split.path)
        self.query = urllib.parse.parse_qs(split.query)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            failure = next(
                (
                    f
                    for f in self.hub.failures
                    if f.method == self.command and f.path.search(path) and f.remaining != 0
                ),
                None,
            )
            if failure is not None and failure.remaining is not None:
                failure.remaining -= 1
        if failure is not None and failure.silent:
            self.hub.stopped.wait()
            self.close_connection = True
            return
        self.cut_after = None if failure is None else failure.after
        if failure is not None and failure.status is None and failure.after is None:
            self.close_connection = True
            return
        self.body = self._read_body()
        try:
            if failure is not None and failure.status is not None:
                raise _Error(failure.status, None, "This failure was asked for.", failure.headers)
            for method, pattern, handler in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    with self.hub.lock:
                        handler(self, *match.groups())
                    return
            raise _Error(404, None, f"This Hub does not know {self.command} {path}.")
        except _Error as error:
            headers = {"X-Error-Message": str(error), **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._reply(error.status, {"error": str(error)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def _reply(self, status: int, content: bytes | dict | list, headers: dict | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: self.cut_after])
            self.close_connection |= self.cut_after is not None

    # Access

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}")

    def _need_token(self) -> None:
        if not self._authorised():
            raise _Error(401, None, f"Invalid username or password. The token of this Hub is {TOKEN}.")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise _Error(403, None, "Forbidden: this token may read, not write.")

    def auth_check(self, plural: str, repo_id: str, write: str | None) -> None:
        self._repository(plural, repo_id)
        if write:
            self._need_token()
        self._reply(200, {})

    def _repository(self, plural: str | None, repo_id: str) -> Repository:
        repository = self.hub.repositories.get((PLURALS[plural or "models"], repo_id))
        if repository is None or (repository.private and not self._authorised()):
            raise _Error(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
        return repository

    def _revision(self, repository: Repository, revision: str) -> tuple[str, dict]:
        resolved = repository.resolve(revision)
        if resolved is None:
            raise _Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return resolved

    # Repositories

    def whoami(self) -> None:
        self._need_token()
        token = {"displayName": "local", "role": "write"}
        self._reply(200, {"type": "user", "name": "owner", "orgs": [], "auth": {"accessToken": token}})

    def create(self) -> None:
        self._need_token()
        request = json.loads(self.body)
        repo_type, repo_id = self._named(request)
        prefix = PREFIXES[repo_type]
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "id": repo_id, "name": repo_id}
        if (repo_type, repo_id) in self.hub.repositories:
            self._reply(409, {**answer, "error": "You already created this repo"})
            return
        self.hub.create(repo_type, repo_id, request.get("private") or request.get("visibility") == "private")
        self._reply(200, answer)

    def delete(self) -> None:
        self._need_token()
        if self.hub.repositories.pop(self._named(json.loads(self.body)), None) is None:
            raise _Error(404, "RepoNotFound", "Repository not found")
        self._reply(200, {})

    def _named(self, request: dict) -> tuple[str, str]:
        repo_type = request.get("type") or "model"
        if repo_type not in PLURALS.values():
            raise _Error(400, None, f"This Hub holds models, data sets and Spaces, no {repo_type}.")
        return repo_type, f"{request.get('organization') or 'owner'}/{request['name']}"

    def info(self, plural: str, repo_id: str, revision: str | None = None) -> None:
        repository = self._repository(plural, repo_id)
        sha, files = self._revision(repository, revision or "main")
        answer = {
            "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": sha,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
        if "README.md" in files:
            answer["cardData"] = _metadata(self.hub.blobs[files["README.md"][0]].decode(errors="replace")) or {}
            answer["tags"] = answer["cardData"].get("tags", [])
        self._reply(200, answer)

    def refs(self, plural: str, repo_id: str) -> None:
        repository = self._repository(plural, repo_id)
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repository.tags.items()]
        self._reply(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, plural: str, repo_id: str, revision: str) -> None:
        repository = self._repository(plural, repo_id)
        sha, _ = self._revision(repository, revision)
        shas = [commit[0] for commit in repository.commits]
        answer = [
            {
                "id": sha,
                "title": title,
                "message": "",
                "authors": [{"user": "owner"}],
                "date": "2026-01-01T00:00:00.000Z",
            }
            for sha, title, _ in repository.commits[: shas.index(sha) + 1]
        ]
        self._reply(200, answer[::-1])

    def tag(self, plural: str, repo_id: str, name: str) -> None:
        self._need_token()
        repository = self._repository(plural, repo_id)
        if self.command == "DELETE":
            if repository.tags.pop(name, None) is None:
                raise _Error(404, "RevisionNotFound", f"Invalid rev id: {name}")
        else:
            tag = json.loads(self.body)["tag"]
            if tag in repository.tags:
                raise _Error(409, None, f"Tag {tag} already exists.")
            repository.tags[tag] = self._revision(repository, name)[0]
        self._reply(200, {})

    def validate(self) -> None:
        request = json.loads(self.body)
        errors, warnings = check_card(request["content"], request["repoType"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": [{"message": w} for w in warnings]}
        self._reply(400 if errors else 200, answer)

    # Files

    def tree(self, plural: str, repo_id: str, revision: str, folder: str | None = None) -> None:
        _, files = self._revision(self._repository(plural, repo_id), revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path in sorted(files):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                entries[path] = self._entry(path, *files[path])
        if folder and not entries:
            raise _Error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self._reply(200, list(entries.values()))

    def paths_info(self, plural: str, repo_id: str, revision: str) -> None:
        _, files = self._revision(self._repository(plural, repo_id), revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
        answer = []
        for path in paths:
            if path in files:
                answer.append(self._entry(path, *files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                answer.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self._reply(200, answer)

    def _entry(self, path: str, oid: str, is_lfs: bool) -> dict:
        size = len(self.hub.blobs[oid])
        entry = {"type": "file", "path": path, "size": size, "oid": _git_oid(self.hub.blobs[oid])}
        return {**entry, "lfs": {"oid": oid, "size": size, "pointerSize": 130}} if is_lfs else entry

    def resolve(self, plural: str | None, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._revision(self._repository(plural, repo_id), revision)
        if path not in files:
            raise _Error(404, "EntryNotFound", "Entry not found")
        oid, is_lfs = files[path]
        content = self.hub.blobs[oid]
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{oid if is_lfs else _git_oid(content)}"',
            "X-Repo-Commit": sha,
        }
        if is_lfs:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or wanted.groups() == ("", ""):
            self._reply(200, content, headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= stop:
            self._reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._reply(206, content[start:stop], headers)

    # Uploads

    def preupload(self, plural: str, repo_id: str, revision: str) -> None:
        self._need_token()
        _, files = self._revision(self._repository(plural, repo_id), revision)
        answer = []
        for item in json.loads(self.body)["files"]:
            path = item["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or item["size"] > LFS_SIZE
            answer.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False})
            if path in files:
                oid = files[path][0]
                answer[-1]["oid"] = oid if files[path][1] else _git_oid(self.hub.blobs[oid])
        self._reply(200, {"files": answer})

    def lfs_batch(self, plural: str | None, repo_id: str) -> None:
        self._need_token()
        self._repository(plural, repo_id)
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(answer)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Error(400, None, "The content does not have the announced SHA256.")
        self.hub.blobs[oid] = self.body
        self._reply(200, b"")

    def lfs_verify(self) -> None:
        item = json.loads(self.body)
        if len(self.hub.blobs.get(item["oid"], b"")) != item["size"]:
            raise _Error(404, None, "The object is not stored, or has another size.")
        self._reply(200, {})

    def commit(self, plural: str, repo_id: str, revision: str) -> None:
        self._need_token()
        repository = self._repository(plural, repo_id)
        if revision != "main":
            raise _Error(400, None, "This Hub commits to main only.")
        files = dict(repository.commits[-1][2])
        title = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repository.head):
                    raise _Error(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                content = base64.b64decode(value["content"])
                if value["path"] == "README.md":
                    errors, _ = check_card(content.decode(), repository.repo_type)
                    if errors:
                        raise _Error(400, None, "Invalid metadata in README.md: " + "; ".join(errors))
                files[value["path"]] = (self.hub.store(content), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Error(400, None, f"LFS object of {value['path']} was not uploaded.")
                files[value["path"]] = (value["oid"], True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {path: entry for path, entry in files.items() if not path.startswith(prefix)}
        sha = repository.commit(title, files)
        prefix = PREFIXES[repository.repo_type]
        url = f"{self.hub.url}/{prefix}{repo_id}/commit/{sha}"
        self._reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


_TYPE, _REPO, _REVISION = r"(models|datasets|spaces)", r"([^/]+/[^/]+)", r"([^/]+|refs/[^/]+/[^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("DELETE", r"/api/repos/delete", _Handler.delete),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/{_TYPE}/{_REPO}", _Handler.info),
    ("GET", rf"/api/{_TYPE}/{_REPO}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"/api/{_TYPE}/{_REPO}/auth-check(/write)?", _Handler.auth_check),
    ("GET", rf"/api/{_TYPE}/{_REPO}/refs", _Handler.refs),
    ("GET", rf"/api/{_TYPE}/{_REPO}/commits/{_REVISION}", _Handler.commits),
    ("GET", rf"/api/{_TYPE}/{_REPO}/tree/{_REVISION}", _Handler.tree),
    ("GET", rf"/api/{_TYPE}/{_REPO}/tree/{_REVISION}/(.+)", _Handler.tree),
    ("POST", rf"/api/{_TYPE}/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    ("POST DELETE", rf"/api/{_TYPE}/{_REPO}/tag/(.+)", _Handler.tag),
    ("POST", rf"/api/{_TYPE}/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/{_TYPE}/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/(?:(datasets|spaces)/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", r"/lfs/verify", _Handler.lfs_verify),
    ("GET HEAD", rf"/(?:(datasets|spaces)/)?{_REPO}/resolve/{_REVISION}/(.+)", _Handler.resolve),
)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _metadata(card: str) -> dict | None:
    block = re.match(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    metadata = yaml.safe_load(block.group(1)) if block else None
    return metadata if isinstance(metadata, dict) else None


def check_card(card: str, repo_type: str) -> tuple[list[str], list[str]]:
    """What the Hub finds wrong with the metadata of a card: errors and warnings."""
    try:
        metadata = _metadata(card)
    except yaml.YAMLError as error:
        return [f"The metadata is no YAML: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    licences = metadata.get("license", [])
    tags = metadata.get("tags", [])
    models = metadata.get("model-index", []) if repo_type == "model" else []
    results = [result for model in models for result in model.get("results", [])]
    metrics = [metric for result in results for metric in result.get("metrics", [])]
    required = {
        f'"license" must be one of {", ".join(LICENCES)}': set([licences] if isinstance(licences, str) else licences)
        <= set(LICENCES),
        '"license_name" must match /^[a-z0-9-.]+$/': re.fullmatch(
            r"[a-z0-9.-]+", metadata.get("license_name", "other")
        ),
        '"tags" must be an array of strings': isinstance(tags, list)
        and all(tag and isinstance(tag, str) for tag in tags),
        '"model-index[].name" must be a string': all(isinstance(model.get("name"), str) for model in models),
        '"model-index[].results[]" needs task.type, dataset.type and dataset.name': all(
            result.get("task", {}).get("type")
            and result.get("dataset", {}).get("type")
            and result["dataset"].get("name")
            for result in results
        ),
        '"model-index[].results[].metrics[]" needs type and value': all(
            metric.get("type") and isinstance(metric.get("value"), int | float | str) for metric in metrics
        ),
    }
    return [message for message, fulfilled in required.items() if not fulfilled], []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1; 0 takes a free one")
    port = parser.parse_args().port
    with HubServer(port) as server:
        print("# A Hub that forgets everything when it stops. In another terminal:")
        for name, value in server.environment(Path("outputs/hub-home").resolve()).items():
            print(f"export {name}={value}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
