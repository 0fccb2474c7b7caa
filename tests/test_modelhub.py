"""The ModelHub client against a stand-in server on loopback."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from aquila2_tut import modelhub
from aquila2_tut.modelhub import ModelHub, ModelHubError, check_file_name, choose_files, parse_file_list, parse_model_id

NAME = "Aquila2-7B"
FILES = {
    "config.json": b'{"model_type": "aquila"}',
    "tokenizer.json": b"{}",
    "pytorch_model-00001-of-00002.bin": bytes(range(256)) * 4096,
    "pytorch_model-00002-of-00002.bin": b"second" * 1000,
    "modeling_aquila.py": b"raise SystemExit('code that came with a checkpoint ran')",
}


class StandIn(ThreadingHTTPServer):
    """Answers as the ModelHub does; the attributes below make it misbehave."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files, self.listing, self.id_answer = dict(FILES), None, "100118"
        self.requests, self.ranges = [], []
        self.cut_after, self.ignore_range, self.pause, self.extra = None, False, 0.0, b""
        self.location = None
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, headers=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.requests.append(url.path)
        if url.path == "/api/searchModleByName":
            known = parse_qs(url.query)["model_name"] == [NAME]
            self.answer((self.server.id_answer if known else "null").encode())
        elif url.path == "/api/searchModelFileByName":
            self.answer((self.server.listing or str(list(self.server.files))).encode())
        elif url.path.startswith("/store/"):
            self.serve_file(self.server.files[url.path.removeprefix("/store/")] + self.server.extra)
        else:
            self.answer(b"", 404)

    def do_POST(self):
        self.server.requests.append(self.path)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model_id"] == self.server.id_answer
        name = asked["checkpoint_name"]
        if name not in self.server.files:
            answer = {"code": "40002", "files": list(self.server.files)}
        else:
            url = f"{self.server.address}/store/{name}"
            answer = {"code": "200", "url": url, "size": len(self.server.files[name])}
        self.answer(json.dumps(self.server.location or answer).encode())

    def serve_file(self, data):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked[len("bytes=") : -1]) if asked and not self.server.ignore_range else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        rest = data[start:]
        if self.server.cut_after is not None:
            rest = rest[: self.server.cut_after]
        for at in range(0, len(rest), 1 << 16):
            self.wfile.write(rest[at : at + (1 << 16)])
            time.sleep(self.server.pause)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server():
    stand_in = StandIn()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setattr(modelhub, "time", SimpleNamespace(sleep=lambda seconds: None))
    return ModelHub(f"{server.address}/api", progress=False)


def test_a_checkpoint_arrives_whole_and_without_code(hub, server, tmp_path):
    folder = hub.download(NAME, tmp_path / NAME)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: data for name, data in FILES.items() if not name.endswith(".py")
    }
    assert not (tmp_path / f".{NAME}.part").exists()
    assert server.requests[:2] == ["/api/searchModleByName", "/api/searchModelFileByName"]


def test_a_second_call_contacts_nobody(hub, server, tmp_path):
    hub.download(NAME, tmp_path / NAME)
    server.requests.clear()
    hub.download(NAME, tmp_path / NAME)
    assert server.requests == []


def test_the_address_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("AQUILA2_TUT_MODELHUB", f"{server.address}/api/")
    assert ModelHub().model_id(NAME) == "100118"


def test_cut_connections_are_resumed_by_range(hub, server, tmp_path):
    server.cut_after = 300_000
    hub.download(NAME, tmp_path / NAME)
    assert (tmp_path / NAME / "pytorch_model-00001-of-00002.bin").read_bytes() == FILES[
        "pytorch_model-00001-of-00002.bin"
    ]
    assert [r for r in server.ranges if r] == ["bytes=262144-", "bytes=524288-", "bytes=786432-"]


def test_a_server_that_ignores_range_starts_the_file_anew(hub, server, tmp_path):
    part = tmp_path / f".{NAME}.part" / "pytorch_model-00001-of-00002.bin.part"
    part.parent.mkdir()
    part.write_bytes(b"old bytes")
    server.ignore_range = True
    hub.download(NAME, tmp_path / NAME)
    assert (tmp_path / NAME / part.stem).read_bytes() == FILES[part.stem]


def test_a_server_that_sends_nothing_is_given_up_with_a_way_on(hub, server, tmp_path):
    server.cut_after = 0
    with pytest.raises(ModelHubError, match=r"stopped at 0 of 24 bytes .* run the command again"):
        hub.download(NAME, tmp_path / NAME)
    assert len(server.ranges) == modelhub.ATTEMPTS
    assert not (tmp_path / NAME).exists()


def test_a_file_longer_than_announced_is_refused_and_not_kept(hub, server, tmp_path):
    server.extra = b"!"
    with pytest.raises(ModelHubError, match="longer than the 24 bytes"):
        hub.download(NAME, tmp_path / NAME)
    assert (tmp_path / f".{NAME}.part" / "config.json.part").read_bytes() == b""


def test_a_killed_run_goes_on_where_it_stopped(server, hub, tmp_path):
    server.pause = 0.05
    code = (
        "import sys; from pathlib import Path; from aquila2_tut.modelhub import ModelHub;"
        f"ModelHub({server.address + '/api'!r}, progress=False).download({NAME!r}, Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / NAME)])
    part = tmp_path / f".{NAME}.part" / "pytorch_model-00001-of-00002.bin.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 200_000):
        assert time.monotonic() < deadline and process.poll() is None
        threading.Event().wait(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert not (tmp_path / NAME).exists(), "a cut download must not look like a checkpoint"
    server.pause, server.ranges = 0.0, []
    hub.download(NAME, tmp_path / NAME)
    assert server.ranges == [f"bytes={have}-", None], "the finished files and the first bytes are not fetched again"
    assert (tmp_path / NAME / part.stem).read_bytes() == FILES[part.stem]


def test_two_downloads_at_once_fetch_each_file_once(hub, server, tmp_path):
    threads = [threading.Thread(target=hub.download, args=(NAME, tmp_path / NAME)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.ranges) == 4


def test_an_unknown_model(hub, tmp_path):
    with pytest.raises(ModelHubError, match="knows no such model"):
        hub.download("Aquila3", tmp_path / "Aquila3")


def test_a_file_that_the_service_lost(hub, server, tmp_path):
    server.listing = "['config.json', 'pytorch_model.bin']"
    with pytest.raises(ModelHubError, match=r"no longer has pytorch_model\.bin"):
        hub.download(NAME, tmp_path / NAME)


def test_no_service(tmp_path):
    with pytest.raises(ModelHubError, match=r"127\.0\.0\.1:9/searchModleByName: no connection"):
        ModelHub("http://127.0.0.1:9", progress=False).download(NAME, tmp_path / NAME)
    assert not list(tmp_path.iterdir()), "a service that is out of reach leaves nothing behind"


def test_a_disk_that_is_too_small(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(modelhub.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(ModelHubError, match=r"config.json needs 0.0 GB more; the disk of .* has 0.0 GB free"):
        hub.download(NAME, tmp_path / NAME)


@pytest.mark.parametrize(
    "location",
    [
        {"code": "200", "url": "file:///etc/passwd", "size": 24},
        {"code": "200", "url": "http://127.0.0.1/x", "size": -1},
        {"code": "200", "url": "http://127.0.0.1/x", "size": "1 or more"},
        {"code": "200"},
        ["url"],
    ],
)
def test_an_answer_without_a_usable_address(hub, server, location):
    server.location = location
    with pytest.raises(ModelHubError, match=r"address and size|cannot be read"):
        hub.location("100118", "config.json")


@pytest.mark.parametrize(
    "text",
    [
        "['config.json', 'a.bin']",
        '["config.json", "a.bin"]',
        "['config.json', \"a.bin\",]",
        " ['config.json','a.bin']\n",
    ],
)
def test_lists_in_either_notation(text):
    assert parse_file_list(text) == ["config.json", "a.bin"]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch x')",
        "['a.bin'] + ['b.bin']",
        "['a.bin', open('x')]",
        "[1, 2]",
        '{"a": 1}',
        "null",
        "",
        "[]",
        "[" * 100_000,
        "['\\x2e\\x2e/a']",
        "<html>404</html>",
    ],
)
def test_lists_that_are_none(text):
    with pytest.raises(ModelHubError, match="cannot be read"):
        parse_file_list(text)


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "a/b.bin",
        "a\\b.bin",
        "..",
        ".",
        ".bashrc",
        "",
        "a\nb",
        "a\x1b[31m",
        "C:evil",
        "x" * 300,
        "a..b",
    ],
)
def test_names_that_leave_the_folder(name):
    with pytest.raises(ModelHubError, match="not a plain file name; nothing was saved"):
        check_file_name(name)
    with pytest.raises(ModelHubError):
        parse_file_list(json.dumps(["config.json", name]))


@pytest.mark.parametrize("text", ["100118", '"100118"', " 100118\n"])
def test_model_numbers(text):
    assert parse_model_id(text) == "100118"


@pytest.mark.parametrize("text", ["null", "", "-1", "1e5", "<html>", "1; drop"])
def test_answers_that_are_no_model_number(text):
    with pytest.raises(ModelHubError, match="knows no such model"):
        parse_model_id(text)


def test_an_endless_answer_is_cut_short(hub, server):
    server.id_answer = "1" * (modelhub.MAX_ANSWER + 10)
    with pytest.raises(ModelHubError, match="more than"):
        hub.model_id(NAME)


def test_safetensors_win_over_bin():
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "optimizer.bin", "run.py", "tokenizer.json"]
    assert choose_files(names) == ["config.json", "tokenizer.json", "model.safetensors"]


def test_a_list_without_weights():
    with pytest.raises(ModelHubError, match=r"config\.json and weights are needed"):
        choose_files(["config.json", "README.md"])
