"""Assets against a stand-in package index on loopback: resume, checksums, two processes at once, plain messages."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from aquila2_tut import assets
from aquila2_tut.assets import Asset, AssetError

PAYLOAD = hashlib.sha256(b"aquila").digest() * 30_000  # 960,000 bytes


def wheel(members: dict[str, bytes]) -> bytes:
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return box.getvalue()


def sdist(members: dict[str, bytes]) -> bytes:
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return box.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


WHEEL = wheel({"../evil.txt": b"out of the folder", "tiny_model/weights.gguf": PAYLOAD})
SDIST = sdist({"tiny_vocab-2.0/README": b"hello", "tiny_vocab-2.0/models/vocab.gguf": PAYLOAD[:50_000]})


def entry(name: str, package: str, archive: str, content: bytes, member: str, payload: bytes) -> Asset:
    return Asset(
        name=name,
        package=package,
        version="2.0",
        archive=archive,
        archive_sha256=digest(content),
        archive_size=len(content),
        member=member,
        filename=member.rsplit("/", 1)[-1],
        sha256=digest(payload),
        size=len(payload),
        licence="CC0-1.0",
        attribution="made here",
        purpose="a test",
        book=True,
    )


MODEL = entry("model", "Tiny_Model", "tiny_model-2.0-py3-none-any.whl", WHEEL, "tiny_model/weights.gguf", PAYLOAD)
VOCAB = entry(
    "vocab", "tiny.vocab", "tiny_vocab-2.0.tar.gz", SDIST, "tiny_vocab-2.0/models/vocab.gguf", PAYLOAD[:50_000]
)


class Index(http.server.ThreadingHTTPServer):
    """A package index of two files. What it does wrong is set by its attributes; ``asked`` is its diary."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {MODEL.archive: WHEEL, VOCAB.archive: SDIST}
        self.asked: list[tuple[str, str | None]] = []
        self.speaks_json = True
        self.knows_range = True
        self.cut_after: int | None = None  # bytes of the next file answer, then the line goes dead
        self.before_cut = threading.Event()  # a test that clears it makes the line hang before it goes dead
        self.before_cut.set()
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"

    @property
    def downloads(self) -> list[str | None]:
        """The Range header of every request for a file."""
        return [asked_range for path, asked_range in self.asked if path.startswith("/files/")]

    def handle_error(self, request, client_address) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/files/"):
            self.send_file(self.server.files[self.path.removeprefix("/files/")])
        elif self.path in ("/simple/tiny-model/", "/simple/tiny-vocab/"):
            self.send_listing()
        else:
            self.send_error(404)

    def send_listing(self) -> None:
        if self.server.speaks_json and "json" in self.headers.get("Accept", ""):
            kind = "application/vnd.pypi.simple.v1+json"
            text = json.dumps({"files": [{"filename": name, "url": f"/files/{name}"} for name in self.server.files]})
        else:
            kind = "text/html"
            text = "".join(f'<a href="../../files/{name}#sha256=0">a file</a>' for name in self.server.files)
        self.answer(200, text.encode(), {"Content-Type": kind})

    def send_file(self, content: bytes) -> None:
        time.sleep(self.server.delay)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not (asked and self.server.knows_range):
            return self.answer(200, content)
        start = int(asked.group(1))
        if start >= len(content):
            return self.send_error(416)
        return self.answer(206, content[start:], {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.server.cut_after if len(body) > 2000 else None
        self.wfile.write(body[:cut])
        if cut:
            self.server.cut_after = None
            self.server.before_cut.wait(timeout=30)
            self.connection.close()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, a manifest of two tiny assets, and no pip settings of the machine that runs the test."""
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("AQUILA2_TUT_ARCHIVES", raising=False)
    monkeypatch.setenv("AQUILA2_TUT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(assets, "MANIFEST", {"model": MODEL, "vocab": VOCAB})
    monkeypatch.setattr(assets, "_pip", lambda *arguments: "")
    monkeypatch.setattr(assets, "CHUNK", 4096)
    monkeypatch.setattr(assets, "RETRY_PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def index(cache, monkeypatch):
    server = Index()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()


def left_over(asset: Asset) -> set[str]:
    return {file.name for file in asset.folder.iterdir()} - {asset.filename, asset.filename + ".verified", ".lock"}


@pytest.mark.parametrize("name", ["model", "vocab"])
@pytest.mark.parametrize("speaks_json", [True, False], ids=["json", "html"])
def test_fetch_takes_the_one_member_and_drops_the_archive(index, name, speaks_json):
    index.speaks_json = speaks_json
    asset = assets.MANIFEST[name]
    file = assets.fetch(name)
    assert file == assets.path(name) == asset.file
    assert digest(file.read_bytes()) == asset.sha256
    assert left_over(asset) == set()
    assert not list(assets.home().rglob("evil.txt"))


def test_second_fetch_asks_nobody(index):
    assets.fetch("model")
    asked = len(index.asked)
    assets.fetch("model")
    assets.path("model")
    assert len(index.asked) == asked


def test_cut_connection_goes_on_in_the_same_call(index):
    index.cut_after = 400_000
    assets.fetch("model")
    first, second = index.downloads
    assert first is None
    have = int(re.fullmatch(r"bytes=(\d+)-", second).group(1))
    assert 0 < have <= 400_000


def test_cut_connection_goes_on_in_the_next_call(index, monkeypatch):
    monkeypatch.setattr(assets, "RETRIES", 1)
    index.cut_after = 400_000
    with pytest.raises(AssetError, match="goes on where it stopped"):
        assets.fetch("model")
    assert not MODEL.file.exists()
    part = MODEL.folder / (MODEL.archive + ".part")
    have = part.stat().st_size
    assert have > 0
    assets.fetch("model")
    assert index.downloads == [None, f"bytes={have}-"]


CHILD = """
import json, sys
from pathlib import Path
from aquila2_tut import assets
assets.MANIFEST = assets.load_manifest(Path(sys.argv[1]))
print(assets.fetch("model"))
"""


@pytest.fixture
def start_child(index, tmp_path):
    """A function that starts another process which fetches "model"."""
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"assets": [asdict(MODEL)]}))
    command = [sys.executable, "-c", CHILD, str(manifest)]
    return lambda: subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_killed_download_goes_on(index, start_child):
    """kill -9 half way: the next one takes up the part, and the dead one's lock and temporary file do not matter."""
    index.cut_after = 400_000
    index.before_cut.clear()
    part = MODEL.folder / (MODEL.archive + ".part")
    child = start_child()
    deadline = time.monotonic() + 30
    while (not part.exists() or part.stat().st_size < 100_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.communicate()
    index.before_cut.set()
    have = part.stat().st_size
    (MODEL.folder / ".new-abc").write_bytes(b"half a member")
    assert not MODEL.file.exists()
    assert 100_000 <= have <= 400_000
    assert digest(assets.fetch("model").read_bytes()) == MODEL.sha256
    assert index.downloads == [None, f"bytes={have}-"]
    assert left_over(MODEL) == set()


def test_three_processes_at_once_download_once(index, start_child):
    index.delay = 1.0  # all are well under way before the first byte comes
    children = [start_child() for _ in range(3)]
    answers = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], answers
    assert {out.strip() for out, _ in answers} == {str(MODEL.file)}
    assert index.downloads == [None]
    assert sum("another process is fetching it" in err for _, err in answers) >= 1


@pytest.mark.parametrize("knows_range", [True, False])
@pytest.mark.parametrize(
    "left",
    [b"x" * 5000, b"x" * len(WHEEL), WHEEL + b"more"],
    ids=["wrong start", "complete but wrong", "longer than the archive"],
)
def test_useless_part_is_thrown_away(index, left, knows_range):
    index.knows_range = knows_range
    MODEL.folder.mkdir(parents=True)
    (MODEL.folder / (MODEL.archive + ".part")).write_bytes(left)
    assert digest(assets.fetch("model").read_bytes()) == MODEL.sha256


def test_archive_with_a_wrong_checksum_is_refused(index):
    index.files[MODEL.archive] = WHEEL[:-1] + b"?"
    with pytest.raises(AssetError, match="SHA-256 should be"):
        assets.fetch("model")
    assert not MODEL.file.exists()
    assert left_over(MODEL) == set()


def test_archive_of_another_size_is_refused(index):
    index.files[MODEL.archive] = WHEEL + b"more"
    with pytest.raises(AssetError, match="another size"):
        assets.fetch("model")
    assert not MODEL.file.exists()


def test_member_with_a_wrong_checksum_is_refused(index, monkeypatch):
    monkeypatch.setitem(assets.MANIFEST, "model", replace(MODEL, sha256="0" * 64))
    with pytest.raises(AssetError, match="not the file that the manifest names"):
        assets.fetch("model")
    assert not MODEL.file.exists()


@pytest.mark.parametrize("name", ["model", "vocab"])
def test_member_that_is_not_there_is_named(index, monkeypatch, name):
    monkeypatch.setitem(assets.MANIFEST, name, replace(assets.MANIFEST[name], member="elsewhere/x.bin"))
    with pytest.raises(AssetError, match=r"holds no elsewhere/x\.bin"):
        assets.fetch(name)


def test_damaged_copy_is_refused_and_fetched_again(index, capsys):
    file = assets.fetch("model")
    file.write_bytes(PAYLOAD[:-1] + b"?")
    assert assets.verify("model") == "damaged"
    with pytest.raises(AssetError, match=r"damaged.*aquila2-tut assets fetch model"):
        assets.path("model")
    assert assets.run_cli(["verify"]) == 1
    assets.fetch("model")
    assert assets.path("model").read_bytes() == PAYLOAD
    assert len(index.downloads) == 2
    assert "damaged; fetching it again" in capsys.readouterr().err


def test_verify_does_not_trust_the_stamp(index):
    """Same size and same time, other bytes: ``path`` is cheap and cannot see it, ``verify`` and ``fetch`` do."""
    file = assets.fetch("model")
    times = file.stat()
    file.write_bytes(PAYLOAD[:-1] + b"?")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert assets.verify("model") == "damaged"
    assets.fetch("model")
    assert assets.verify("model") == "ready"


def test_path_hashes_only_what_changed(index, monkeypatch):
    file = assets.fetch("model")
    hashed = []
    monkeypatch.setattr(assets, "_sha256", lambda file: hashed.append(file) or MODEL.sha256)
    assets.path("model")
    assert hashed == []
    os.utime(file)
    assets.path("model")
    assets.path("model")
    assert hashed == [file]


def test_no_network_says_what_is_missing_and_what_to_do(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://reader:secret@127.0.0.1:9/simple")
    with pytest.raises(AssetError) as caught:
        assets.fetch("model")
    message = str(caught.value)
    for part in ("model (1.0 MB", "127.0.0.1: no answer", "aquila2-tut assets fetch model", MODEL.archive):
        assert part in message
    assert "secret" not in message


def test_absent_asset_says_its_size_and_the_command(cache):
    with pytest.raises(AssetError, match=r"1\.0 MB.*aquila2-tut assets fetch model"):
        assets.path("model")


def test_unknown_name_lists_the_known_ones(cache):
    for function in (assets.path, assets.fetch, assets.verify):
        with pytest.raises(AssetError, match=r"'gpt-5'.*model, vocab"):
            function("gpt-5")


def test_index_without_the_archive_is_passed_over(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("/simple", "/nothing"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index.url)
    assert assets.fetch("model").is_file()


def test_index_in_a_folder(cache, tmp_path, monkeypatch):
    listing = tmp_path / "an index" / "tiny-model"
    listing.mkdir(parents=True)
    (listing / MODEL.archive).write_bytes(WHEEL)
    (listing / "index.html").write_text(f'<a href="{MODEL.archive}">{MODEL.archive}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", listing.parent.as_uri())
    assert digest(assets.fetch("model").read_bytes()) == MODEL.sha256


README = replace(
    VOCAB, name="readme", member="tiny_vocab-2.0/README", filename="README", sha256=digest(b"hello"), size=5
)


@pytest.mark.parametrize("members", [["vocab", "readme"], ["readme", "vocab"], ["vocab"], ["readme"]])
def test_an_archive_is_downloaded_once_for_all_that_the_book_needs_of_it(index, monkeypatch, members):
    monkeypatch.setitem(assets.MANIFEST, "readme", README)
    files = assets.fetch_all([*members, "model"])
    assert files == [assets.path(name) for name in [*members, "model"]]
    assert assets.path("readme").read_bytes() == b"hello"
    assert assets.path("vocab").read_bytes() == PAYLOAD[:50_000]
    assert index.downloads == [None, None]
    assert left_over(VOCAB) == left_over(README) == set()


def test_what_the_book_does_not_need_is_left_in_the_archive(index, monkeypatch):
    monkeypatch.setitem(assets.MANIFEST, "readme", replace(README, book=False))
    assets.fetch("vocab")
    assert not README.file.exists()


def test_sound_files_are_not_fetched_again_with_the_others(index, monkeypatch):
    vocab = assets.fetch("vocab")
    written = vocab.stat().st_mtime_ns
    monkeypatch.setitem(assets.MANIFEST, "readme", README)
    assets.fetch_all(["vocab", "readme"])
    assert vocab.stat().st_mtime_ns == written
    assert len(index.downloads) == 2


def test_an_archive_can_be_the_asset(index, monkeypatch):
    whole = replace(MODEL, member="*", filename=MODEL.archive, sha256=MODEL.archive_sha256, size=len(WHEEL))
    monkeypatch.setitem(assets.MANIFEST, "model", whole)
    assert assets.fetch("model").read_bytes() == WHEEL
    assert left_over(whole) == set()


@pytest.mark.parametrize("variable", ["AQUILA2_TUT_ARCHIVES", "PIP_FIND_LINKS"])
def test_archives_in_a_folder_need_no_network(cache, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / MODEL.archive).write_bytes(WHEEL)
    assert digest(assets.fetch("model").read_bytes()) == MODEL.sha256
    assert (tmp_path / MODEL.archive).is_file()
    with pytest.raises(AssetError, match="pip is set up to use no index"):
        assets.fetch("vocab")


def test_wrong_archive_in_the_named_folder_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("AQUILA2_TUT_ARCHIVES", str(tmp_path))
    (tmp_path / MODEL.archive).write_bytes(SDIST)
    with pytest.raises(AssetError, match="SHA-256"):
        assets.fetch("model")
    monkeypatch.setenv("AQUILA2_TUT_ARCHIVES", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match="not a folder"):
        assets.fetch("model")


# --- Debian and npm ---

DEB = replace(
    MODEL, name="pages", package="pages", version="4:2.0-1", archive="pages_2.0-1_all.deb", member="*", origin="debian",
    filename="pages_2.0-1_all.deb", sha256=digest(WHEEL), size=len(WHEEL), archive_sha256=digest(WHEEL),
    archive_size=len(WHEEL), book=False,
)  # fmt: skip


def poems_asset() -> tuple[Asset, dict[str, bytes], bytes]:
    """An npm package of three files, two of which match."""
    members = {"package/b.json": b"[2]" * 700, "package/a.json": b"[1]" * 700, "package/LICENSE": b"MIT"}
    archive = sdist(members)
    kept = {name: members[name] for name in ("package/a.json", "package/b.json")}
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as target:
        for name, content in kept.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            target.writestr(entry, content)
    asset = replace(
        MODEL, name="poems", package="poems", archive="poems-2.0.tgz", member="package/*.json", filename="poems.zip",
        sha256=digest(box.getvalue()), size=len(box.getvalue()), archive_sha256=digest(archive),
        archive_size=len(archive), origin="npm", book=False,
    )  # fmt: skip
    return asset, kept, archive


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH on which only what the test puts there is found; each program notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, says: str) -> Path:
        diary = tmp_path / f"{name}.log"
        file = folder / name
        file.write_text(f"#!{sys.executable}\nimport sys\nopen({str(diary)!r}, 'a').write(' '.join(sys.argv[1:]))\n")
        with file.open("a") as stream:
            stream.write(f"print({says!r})\n")
        file.chmod(0o755)
        return diary

    return put


@pytest.mark.skipif(os.name == "nt", reason="the stand-in programs are Unix scripts")
class TestOtherOrigins:
    def test_a_debian_package_comes_from_where_apt_gets_it(self, index, tools, monkeypatch):
        monkeypatch.setitem(assets.MANIFEST, "pages", DEB)
        index.files[DEB.archive] = WHEEL
        address = f"{index.url.removesuffix('/simple')}/files/{DEB.archive}"
        diary = tools("apt-get", f"'{address}' pages_4%3a2.0-1_all.deb {len(WHEEL)} SHA256:0")
        assert assets.fetch("pages").read_bytes() == WHEEL
        assert diary.read_text() == "--print-uris download pages=4:2.0-1"
        assert left_over(DEB) == set()

    def test_a_cut_download_goes_on(self, index, tools, monkeypatch):
        monkeypatch.setitem(assets.MANIFEST, "pages", DEB)
        index.files[DEB.archive] = WHEEL
        index.cut_after = 300_000
        tools("apt-get", f"'{index.url.removesuffix('/simple')}/files/{DEB.archive}' x 1")
        assert assets.fetch("pages").read_bytes() == WHEEL
        assert index.downloads[0] is None
        assert re.fullmatch(r"bytes=\d+-", index.downloads[1])

    def test_all_that_match_are_kept_from_an_npm_package(self, index, tools, monkeypatch):
        asset, kept, archive = poems_asset()
        monkeypatch.setitem(assets.MANIFEST, "poems", asset)
        index.files[asset.archive] = archive
        diary = tools("npm", f"{index.url.removesuffix('/simple')}/files/{asset.archive}")
        with zipfile.ZipFile(assets.fetch("poems")) as box:
            assert {name: box.read(name) for name in box.namelist()} == kept
        assert diary.read_text() == "view poems@2.0 dist.tarball"

    def test_without_the_program_the_message_names_the_file(self, cache, tools, monkeypatch):
        asset, _, _ = poems_asset()
        for one, program in ((asset, "npm"), (DEB, "apt-get")):
            monkeypatch.setitem(assets.MANIFEST, one.name, one)
            with pytest.raises(AssetError) as caught:
                assets.fetch(one.name)
            for part in (f"no {program} on this machine", one.archive, one.archive_sha256, "AQUILA2_TUT_ARCHIVES"):
                assert part in str(caught.value)
            assert "Only retraining the small model needs it" in str(caught.value)

    def test_a_version_that_debian_has_dropped(self, cache, tools, monkeypatch):
        monkeypatch.setitem(assets.MANIFEST, "pages", DEB)
        tools("apt-get", "E: Version '4:2.0-1' for 'pages' was not found")
        with pytest.raises(AssetError, match=r"does not list pages 4:2\.0-1.*Debian drops a version.*snapshot"):
            assets.fetch("pages")

    @pytest.mark.parametrize("name", ["pages_2.0-1_all.deb", "pages_4%3a2.0-1_all.deb"])
    def test_both_names_of_a_debian_archive_are_found_in_the_named_folder(
        self, cache, tools, tmp_path, monkeypatch, name
    ):
        monkeypatch.setitem(assets.MANIFEST, "pages", DEB)
        monkeypatch.setenv("AQUILA2_TUT_ARCHIVES", str(tmp_path))
        (tmp_path / name).write_bytes(WHEEL)
        assert assets.fetch("pages").read_bytes() == WHEEL

    def test_a_plain_fetch_leaves_them_alone(self, index, monkeypatch):
        monkeypatch.setitem(assets.MANIFEST, "pages", DEB)
        assert assets.run_cli(["fetch"]) == 0
        assert not DEB.file.exists()


def test_full_disk_leaves_nothing_half_written(index, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "_copy_checked", full)
    with pytest.raises(AssetError, match=r"disk is full: model needs .* MB free in .*AQUILA2_TUT_HOME"):
        assets.fetch("model")
    assert not MODEL.file.exists()
    assert not list(MODEL.folder.glob(".new-*"))


def test_cache_that_cannot_be_made_is_named(cache, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("AQUILA2_TUT_HOME", str(tmp_path / "a file" / "cache"))
    with pytest.raises(AssetError, match=r"cannot be kept.*AQUILA2_TUT_HOME"):
        assets.fetch("model")


def test_settings_come_from_pip(cache, monkeypatch):
    config = "global.index-url='http://one/simple'\nglobal.extra-index-url='http://two/simple\\nhttp://three/simple'\n"
    monkeypatch.setattr(assets, "_pip", lambda *arguments: config)
    assert assets.pip_indexes() == ["http://one/simple", "http://two/simple", "http://three/simple"]
    monkeypatch.setattr(assets, "_pip", lambda *arguments: config + "download.index-url='http://four/simple'\n")
    assert assets.pip_indexes()[0] == "http://four/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "http://five/simple")
    assert assets.pip_indexes()[0] == "http://five/simple"


def test_without_settings_the_index_is_pips_own(cache, monkeypatch):
    monkeypatch.undo()
    pypi = pytest.importorskip("pip._internal.models.index").PyPI
    assert assets._pip_default_index() == pypi.simple_url


def test_command_line(index, capsys):
    assert assets.run_cli([]) == 0
    assert "absent" in capsys.readouterr().out
    assert assets.run_cli(["verify"]) == 0
    assert assets.run_cli(["verify", "model"]) == 1
    assert assets.run_cli(["fetch"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(MODEL.file), str(VOCAB.file)]
    assert assets.run_cli(["verify", "model", "vocab"]) == 0
    assert assets.run_cli(["fetch", "nothing"]) == 1
    assert "There is no asset 'nothing'" in capsys.readouterr().err


def test_silence_on_request(index, capsys):
    assets.fetch("model", progress=False)
    assert capsys.readouterr() == ("", "")


REAL = assets.load_manifest(Path(assets.__file__).with_suffix(".json"))


def test_default_home_is_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("AQUILA2_TUT_HOME", raising=False)
    assert assets.home().name == "aquila2-tut"


@pytest.mark.parametrize("asset", REAL.values(), ids=list(REAL))
def test_manifest_entry_is_complete(asset):
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in (asset.sha256, asset.archive_sha256))
    assert all(isinstance(size, int) and size > 0 for size in (asset.size, asset.archive_size))
    for field in ("package", "version", "member", "licence", "attribution", "purpose"):
        assert getattr(asset, field).strip(), f"{asset.name}: {field} is empty"
    assert asset.version.rpartition(":")[2] in asset.archive
    assert asset.archive.endswith({"pypi": (".whl", ".tar.gz"), "debian": (".deb",), "npm": (".tgz",)}[asset.origin])
    assert asset.origin == "pypi" or not asset.book, "what the book needs comes from the index that pip uses"
    assert Path(asset.filename).name == asset.filename
    assert re.fullmatch(r"[a-z0-9-]+", asset.name)
    if asset.member == assets.WHOLE:
        assert (asset.filename, asset.sha256, asset.size) == (asset.archive, asset.archive_sha256, asset.archive_size)


def test_manifest_has_what_the_book_opens():
    assert {"smollm2-135m", "aquila-tokenizer"} <= {asset.name for asset in REAL.values() if asset.book}
