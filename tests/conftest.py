from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .hub_server import TOKEN, HubServer
from .script_server import run_python


# Before anything imports torch or a Hugging Face library: networks here are tiny, so threads only get in each other's way, and
# caches of tests go away with them. Processes that tests start inherit both.
_CACHE = tempfile.TemporaryDirectory(prefix="anodiff-tests-")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


# On a busy machine threads of pyarrow or the Hub's client can abort the interpreter while it takes itself down.
LEAVE = "\nimport os, sys; sys.stdout.flush(); os._exit(0)\n"


def pytest_collection_modifyitems(items):
    """Runs tests of scripts first: a few that take long, which no process should be left alone with at the end."""
    items.sort(key=lambda item: "scripts" not in item.path.parts)


@pytest.fixture
def hub():
    """A Hub on 127.0.0.1."""
    with HubServer() as server:
        yield server


@pytest.fixture
def near_hub(hub, tmp_path, monkeypatch):
    """`hub`, asked by this process, with an empty cache; it waits for nothing, and `near_hub.waited` has the seconds that it
    would have."""
    import time

    from huggingface_hub import constants, hf_api

    from anodiff.hub import connection  # noqa: F401 (limits the time of requests)

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + template, "HF_HUB_DISABLE_XET": True}
    for name, value in {**values, "HF_HUB_CACHE": str(tmp_path / "hub-cache")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    hub.waited = []
    monkeypatch.setattr(time, "sleep", hub.waited.append)
    return hub


@pytest.fixture
def hub_client(hub, tmp_path):
    """`hub_client(script, *arguments)` runs Python code in a process of its own whose Hub is `hub`; returns what the script
    printed last, as JSON. Clients of one test share a cache unless `home` names another one. A `fresh` process has
    imported nothing."""

    def run(script: str, *arguments: str | Path, home: str = "home", fresh: bool = False, **variables: str):
        environment = {**os.environ, **hub.environment(tmp_path / home), "OMP_NUM_THREADS": "1", **variables}
        command = ["-c", script + LEAVE, *map(str, arguments)]
        if fresh:
            command = [sys.executable, *command]
            done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
        else:
            done = run_python(command, tmp_path, environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
