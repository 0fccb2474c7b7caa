"""What runs inside the sandbox: a script of its own, which `sandbox.py` starts with an empty environment.

The first process takes namespaces of its own: no network, no view of other processes, a root of its own that can be
read and not written, but for an empty /tmp. The second, which the kernel calls process 1 in there, is the keeper: when
it ends, the kernel ends all that it holds. The third runs the program, with limits and no rights. If there are checks,
they run in a fourth, which calls the program's functions through a pipe and gets nothing back but plain data.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

MIB = 1 << 20
MEMORY, FILES, FILE_SIZE, PROCESSES, OPEN_FILES = 512 * MIB, 16 * MIB, 4 * MIB, 16, 64
LONGEST = 2000  # characters of an error that are told
SYSTEM = ("/usr", "/lib", "/lib64")  # where shared libraries are
DEVICES = ("null", "zero", "urandom")

# Source: the headers of Linux, <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>.
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY = 442, 0x8000, 1
DEATH_SIGNAL, DUMPABLE, NO_NEW_PRIVILEGES, CAPABILITIES_V3 = 1, 4, 38, 0x20080522

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(what: str, *arguments: Any) -> None:
    """A function of the C library that returns 0 or says what went wrong."""
    if getattr(_libc, what)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _own_namespaces() -> bool:
    """Leave the host's network, processes, mounts and names; say whether that was done as root."""
    wanted, uid, gid = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS, os.geteuid(), os.getegid()
    if uid == 0:
        _call("unshare", wanted)
        return True
    _call("unshare", wanted | NEWUSER)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as stream:
            stream.write(line)
    return False


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _read_only(target: str, flags: int = 0) -> None:
    """Forbid writing, set-user-id programs and devices on a mount, with `AT_RECURSIVE` on those below it too."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NOSUID | NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", ctypes.c_long(MOUNT_SETATTR), -100, target.encode(), flags, attributes, size)


def _furnish(root: str) -> None:
    """Make a root out of an empty folder, and go in: system libraries, Python, three devices, an empty /tmp."""
    _mount("none", "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", root, "tmpfs", NOSUID, "size=1m,mode=755")
    for folder in dict.fromkeys([*SYSTEM, *_python_folders()]):
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
        elif os.path.isdir(folder):
            os.makedirs(root + folder, exist_ok=True)
            _mount(folder, root + folder, None, BIND | RECURSIVE)
            _read_only(root + folder, AT_RECURSIVE)
    os.mkdir(f"{root}/dev")
    for device in DEVICES:
        with open(f"{root}/dev/{device}", "x"):
            _mount(f"/dev/{device}", f"{root}/dev/{device}", None, BIND)
    os.mkdir(f"{root}/tmp")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"size={FILES},nr_inodes=1k,mode=1777")
    _read_only(root)
    os.chroot(root)
    os.chdir("/tmp")


def _python_folders() -> list[str]:
    """Where Python's own modules are, unless a folder of the system holds them."""
    places = sorted({os.path.abspath(place) for place in sys.path if os.path.isdir(place)})
    return [place for place in places if place != _HERE and not place.startswith(tuple(f"{top}/" for top in SYSTEM))]


_HERE = os.path.dirname(os.path.abspath(__file__))


def _confine(as_root: bool, seconds: float, keep: tuple[int, ...], uid: int) -> None:
    """Limits, no rights, no open files but those to keep: what is done before the program has its first turn."""
    limits = {"AS": MEMORY, "CPU": int(seconds) + 1, "FSIZE": FILE_SIZE, "NPROC": PROCESSES, "NOFILE": OPEN_FILES}
    for name, value in {**limits, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    for number in range(3, OPEN_FILES):
        if number not in keep:
            with contextlib.suppress(OSError):
                os.close(number)
    os.setsid()
    if as_root:
        _become(uid)
    _call("capset", (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("prctl", DUMPABLE, 0, 0, 0, 0)


def _become(uid: int) -> None:
    """Be somebody without rights; nobody, where the host has given this root few user ids of its own."""
    os.setgroups([])
    try:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:
        nobody = 65533 + uid % 2
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)


# --- the program, and its checks -------------------------------------------------------------------------------------


def _told(error: BaseException) -> bytes:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text[:LONGEST].encode("utf-8", "replace")


def _run(program: str, names: dict[str, Any]) -> None:
    names.update(__name__="__main__", __builtins__=builtins)
    exec(compile(program, "<program>", "exec", dont_inherit=True), names)


def _whole(program: str, verdict: int, mark: bytes) -> NoReturn:
    """Run a program, and say that it came to its end. What is needed for that is taken out of its reach before."""
    write, leave, told = os.write, os._exit, _told
    try:
        _run(program, {})
    except BaseException as error:
        write(verdict, told(error))
    else:
        write(verdict, mark)
    leave(0)


def _serve(program: str, asked: int, answers: int) -> NoReturn:
    """Run a program, then call its functions as the checks ask."""
    names: dict[str, Any] = {}
    with open(asked, "rb") as requests, open(answers, "wb", buffering=0) as replies:
        try:
            _run(program, names)
            replies.write(b'{"ready": 1}\n')
            for line in requests:
                replies.write(_answer(names, json.loads(line)))
        except BaseException as error:
            replies.write(_line({"error": _told(error).decode("utf-8", "replace"), "kind": type(error).__name__}))
    os._exit(0)


def _answer(names: dict[str, Any], request: dict[str, Any]) -> bytes:
    try:
        value = names[request["name"]]
        if "arguments" in request:
            value = value(*map(unpack, request["arguments"]), **{k: unpack(v) for k, v in request["named"].items()})
        return _line({"value": pack(value)})
    except Exception as error:
        return _line({"error": _told(error).decode("utf-8", "replace"), "kind": type(error).__name__})


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def pack(value: Any) -> Any:
    """Plain data as JSON, with the types that JSON has no word for.

    Raises:
        TypeError: something else, such as a function.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if type(value) in (complex, bytes):
        return {type(value).__name__: repr(value)}
    raise TypeError(f"only plain data passes between a program and its checks, no {type(value).__name__}")


def unpack(value: Any) -> Any:
    """What `pack` packed.

    Raises:
        ValueError: it did not.
    """
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind in ("complex", "bytes"):
        return ast.literal_eval(content)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(unpack, content))


class _Far:
    """What the checks have of the program: its functions, by name, on the other side of two pipes."""

    def __init__(self, asked: int, answers: int) -> None:
        self._asked, self._answers = asked, open(answers, "rb")  # noqa: SIM115 - open as long as the process lives
        self._read()

    def _read(self) -> Any:
        line = self._answers.readline(4 * MIB)
        reply = json.loads(line) if line.endswith(b"\n") else {"error": "the program ended, or said too much"}
        if "error" in reply:
            kind = getattr(builtins, str(reply.get("kind")), RuntimeError)
            is_plain = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if is_plain else RuntimeError)(str(reply["error"]))
        return unpack(reply.get("value"))

    def value(self, name: str) -> Any:
        """A variable, or if it is no plain data, a function that calls its like over there."""
        try:
            return self._ask(name=name)
        except TypeError:
            return lambda *given, **named: self._ask(
                name=name, arguments=[pack(item) for item in given], named={k: pack(v) for k, v in named.items()}
            )

    def _ask(self, **request: Any) -> Any:
        os.write(self._asked, _line(request))
        return self._read()


def _check(checks: str, verdict: int, mark: bytes, asked: int, answers: int) -> NoReturn:
    """Run the checks, with the names that they lack bound to those of the program."""
    try:
        far, names = _Far(asked, answers), {}
        for name in lacking(checks):
            names[name] = far.value(name)
        _run(checks, names)
    except BaseException as error:
        os.write(verdict, _told(error))
    else:
        os.write(verdict, mark)
    os._exit(0)


def lacking(checks: str) -> list[str]:
    """The names that a piece of Python uses, and neither binds nor finds among the builtins."""
    used, bound = set(), set()
    for node in ast.walk(ast.parse(checks)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return sorted(used - bound - set(dir(builtins)))


# --- the keeper ------------------------------------------------------------------------------------------------------


def _child(body: Callable[[], NoReturn], as_root: bool, seconds: float, keep: tuple[int, ...], uid: int) -> None:
    """Start a process that is confined before it does anything else.

    Raises:
        ChildProcessError: it could not be confined, and has ended.
    """
    reader, confined = os.pipe()
    if os.fork() == 0:
        _confine(as_root, seconds, (*keep, confined), uid)
        os.write(confined, b"1")
        os.close(confined)
        body()
    os.close(confined)
    if not os.read(reader, 1):
        raise ChildProcessError("a process could not be given limits, or its rights not be taken")
    os.close(reader)


def _keep(request: dict[str, Any], as_root: bool) -> dict[str, Any]:
    """Start the program and its checks, wait for the verdict or the end of the time, and tell it."""
    program, checks, seconds, uid = (request[name] for name in ("program", "checks", "timeout", "uid"))
    reader, verdict = os.pipe()
    begun = time.monotonic()
    if checks is None:
        mark = os.urandom(32)
        _child(lambda: _whole(program, verdict, mark), as_root, seconds, (verdict,), uid)
    else:
        (asked, ask), (answers, answer) = os.pipe(), os.pipe()
        _child(lambda: _serve(program, asked, answer), as_root, seconds, (asked, answer), uid)
        for number in (asked, answer):
            os.close(number)
        mark = os.urandom(32)  # after the program was started, whose memory is a copy of this one
        _child(lambda: _check(checks, verdict, mark, ask, answers), as_root, seconds, (verdict, ask, answers), uid + 1)
    os.close(verdict)
    ready, _, _ = select.select([reader], [], [], seconds)
    said = os.read(reader, 4 * LONGEST) if ready else b"timed out"
    error = None if said == mark else said.decode("utf-8", "replace") or "ended before its end, or was killed"
    return {"passed": said == mark, "error": error, "seconds": time.monotonic() - begun}


def main() -> NoReturn:
    """Read a request from standard input, and write what came of it, as JSON."""
    request = json.load(sys.stdin)
    _call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    as_root = _own_namespaces()
    if keeper := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) & 255)
    _call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _call("prctl", DUMPABLE, 0, 0, 0, 0)
    _furnish(request["root"])
    os.write(1, json.dumps(_keep(request, as_root)).encode())
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(f"refused: {error}", file=sys.stderr)
        os._exit(3)
