"""What is on the hub after a push: asked of a small server that speaks the hub's protocol, as a real client does."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load, load_file

from weightlora.plan.plan import AdapterPlan

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "plan.json", "README.md"}


class Hub(ThreadingHTTPServer):
    """The endpoints of huggingface.co that an upload and a download of small files need; the first commit fails."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories = {}
        self.commits = []
        self.fails = 1
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.send({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        found = re.fullmatch(r"/(me/[^/]+)/resolve/main/([^?]+)(\?.*)?", self.path)
        content = self.server.repositories.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            return self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.send(content, 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40})

    do_HEAD = do_GET

    def do_POST(self):
        path, body = self.path.partition("?")[0], self.body()
        if path == "/api/repos/create":
            name = f"me/{json.loads(body)['name']}"
            self.server.repositories.setdefault(name, {})
            return self.send({"url": f"{self.server.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.send({"files": files})
        found = re.fullmatch(r"/api/models/(me/[^/]+)/commit/main", path)
        if found is None:
            return self.send({"error": f"this hub has no {path}"}, 404)
        if self.server.fails:
            self.server.fails -= 1
            return self.send({"error": "no right to write"}, 403)  # a client tries 500 again by itself
        header, *entries = [json.loads(line) for line in body.splitlines()]
        self.server.commits.append((found[1], header["value"]["summary"]))
        for entry in entries:
            assert entry["key"] == "file"
            content = base64.b64decode(entry["value"]["content"])
            self.server.repositories[found[1]][entry["value"]["path"]] = content
        return self.send({"commitUrl": f"{self.server.address}/{found[1]}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, content, status=200, headers=None):
        kind = "application/octet-stream"
        if not isinstance(content, bytes):
            content, kind = json.dumps(content).encode(), "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def pushed(base, tmp_path_factory):
    """The hub after all pushes, what the command said, and the folder of the process that pushed."""
    folder = tmp_path_factory.mktemp("pushed")
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_of_nobody", "HF_HOME": str(folder / "home")}
        path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        environment = {**os.environ, **own, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "PYTHONPATH": path}
        command = [sys.executable, str(Path(__file__).with_name("hub_worker.py")), str(base), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        hub.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    return hub, json.loads((folder / "told.json").read_text()), folder


@pytest.mark.slow
def test_a_failed_push_is_one_line_and_the_same_command_tries_again(pushed):
    _, told, _ = pushed
    assert told["codes"] == [2, 0]
    assert told["unfinished"]
    lines = [line for line in told["said"].splitlines() if line.startswith("weightlora: error: ")]
    assert len(lines) == 1
    assert re.search(r"cannot push .*adapter to me/sentiment: .*403.*; the same command tries again$", lines[0])


@pytest.mark.slow
def test_the_command_pushes_the_adapter_with_plan_card_and_picture(pushed):
    hub, _, folder = pushed
    files = hub.repositories["me/sentiment"]
    adapter = folder / "sentiment" / "adapter"
    assert files == {path.name: path.read_bytes() for path in adapter.glob("[!.]*")}
    assert ADAPTER | {"plan.png"} <= files.keys()
    assert ("me/sentiment", "End of training") in hub.commits
    assert_card(files)


@pytest.mark.slow
def test_the_plans_own_folder_is_the_same(pushed):
    files = pushed[0].repositories["me/card"]
    assert ADAPTER | {"plan.png"} <= files.keys()
    assert_card(files)


@pytest.mark.slow
def test_the_trainer_pushes_the_plan_of_select_for_and_peft_alone_does_not(pushed):
    repositories = pushed[0].repositories
    assert repositories["me/script"].keys() >= ADAPTER
    assert "plan.json" not in repositories["me/bare"]  # the control, and what the guide says
    assert "adapter_model.safetensors" in repositories["me/bare"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sentiment", "script", "card"])
def test_what_is_downloaded_is_what_was_trained(name, pushed):
    hub, _, folder = pushed
    logits = load_file(folder / f"{name}.safetensors")
    assert logits["hub"].equal(logits["here"])
    assert not logits["hub"].equal(logits["base"])
    plan = AdapterPlan.load(folder / f"{name}.json")
    assert plan == AdapterPlan.load(folder / {"sentiment": "sentiment/adapter"}.get(name, name) / "plan.json")
    adapted = {key.split(".lora_")[0] for key in load(hub.repositories[f"me/{name}"]["adapter_model.safetensors"])}
    assert {f"base_model.model.{site}" for site in plan.names} == {one for one in adapted if "classifier" not in one}


def assert_card(files):
    """The card shows the picture that is beside it, and its text says what the plan keeps."""
    plan = json.loads(files["plan.json"])
    kept = sum(site["r"] > 0 for site in plan["sites"])
    (alt, target) = re.search(r"!\[(.*?)\]\((.*?)\)", files["README.md"].decode()).groups()
    assert files[target].startswith(b"\x89PNG")
    assert f"{kept} of {len(plan['sites'])} sites" in alt
