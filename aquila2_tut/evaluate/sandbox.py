"""Programs that a model wrote, run where they can do no harm: HumanEval, and pass@k.

Such a program is run on request only, and never in this process. On Linux it gets namespaces of its own, see `cage.py`;
where those cannot be had, it is not run. Its verdict comes from outside: checks run in a process of their own, which
the program answers with plain data; so it can be wrong, hang or end, and that is all.
"""

from __future__ import annotations

import ast
import gzip
import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from aquila2_tut import assets
from aquila2_tut.evaluate.errors import EvaluateError

_CAGE = Path(__file__).with_name("cage.py")
_GRACE = 10.0  # seconds beyond the time limit that setting up may take on a busy machine


class Run(NamedTuple):
    """What became of a program.

    Attributes:
        passed: whether it came to its end, and its checks to theirs.
        error: why not, in a line; it may hold text that the program made up. None if it passed.
        seconds: wall-clock time.
    """

    passed: bool
    error: str | None
    seconds: float


class Problem(NamedTuple):
    """One of HumanEval's: a function's head with its docstring, to be completed, and a test."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


def run_program(source: str, timeout: float = 3.0, checks: str | None = None) -> Run:
    """Run a program in a sandbox: no network, an empty folder, 512 MiB, 16 processes, files of 4 MiB, no environment.

    Args:
        source: Python. If it ends as HumanEval's programs do, in `def check(candidate)` and a call of it, that part
            is taken off and used as checks.
        timeout: seconds that it may take.
        checks: Python that is run beside it, and uses its functions by name, with plain data in and out. Without them
            a program passes if it runs to its end without an exception; that is its own word, and one that was
            written to deceive this very sandbox could give it. With them it cannot: the verdict is not in its process.

    Raises:
        EvaluateError: it cannot be contained here, and was not run.
    """
    if sys.platform != "linux":
        raise EvaluateError(f"generated programs are contained with Linux namespaces; this is {sys.platform}")
    if checks is None:
        source, checks = split_checks(source)
    with tempfile.TemporaryDirectory(prefix="aquila2-tut-") as root:
        # A user id that nobody else has, so that the limit of processes counts those of this run only.
        request = {"program": source, "checks": checks, "timeout": timeout, "root": root}
        return _in_cage({**request, "uid": 1 << 30 | secrets.randbits(24) << 1}, timeout + _GRACE)


def _in_cage(request: dict[str, object], limit: float) -> Run:
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CAGE)]
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, env={}, cwd="/", timeout=limit
        )
    except subprocess.TimeoutExpired:
        return Run(False, "timed out", limit)
    if done.returncode == 0 and done.stdout:
        return Run(**json.loads(done.stdout))
    reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    raise EvaluateError(
        f"the program was not run, as it cannot be contained here: {reason[0]}. It takes Linux 5.12 with user "
        "namespaces, or root with the right to unshare (in a container: --cap-add SYS_ADMIN)"
    )


def refusal() -> str | None:
    """Why generated programs cannot be run here; None if they can."""
    try:
        run_program("")
    except EvaluateError as error:
        return str(error)
    return None


def split_checks(source: str) -> tuple[str, str | None]:
    """A program in HumanEval's layout as the part before `def check`, and the rest; others whole, and None."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source, None
    tests = [node.lineno for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    if not tests or not isinstance(last, ast.Call) or ast.unparse(last.func) != "check":
        return source, None
    lines = source.splitlines(keepends=True)
    return "".join(lines[: tests[-1] - 1]), "".join(lines[tests[-1] - 1 :])


# --- HumanEval -------------------------------------------------------------------------------------------------------


def human_eval() -> list[Problem]:
    """HumanEval's problems, all 164.

    Raises:
        AssetError: they have not been fetched; the message says how.
    """
    with gzip.open(assets.path("human-eval"), "rt", encoding="utf-8") as lines:
        return [Problem(**json.loads(line)) for line in lines]


def check_solution(problem: Problem, completion: str, timeout: float = 3.0) -> Run:
    """Whether a completion solves a problem.

    Helpers that the prompt defines are given to the test from the prompt, so that no completion can put its own there.

    Args:
        problem: one of `human_eval()`.
        completion: what comes after the prompt.
        timeout: seconds.
    """
    body = ast.parse(problem.prompt).body
    helpers = [ast.unparse(node) for node in body if getattr(node, "name", None) != problem.entry_point]
    checks = "\n".join([*helpers, problem.test, f"check({problem.entry_point})\n"])
    return run_program(problem.prompt + completion, timeout, checks)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """How likely one of k samples is right, of so many drawn of which so many are: the unbiased estimator.

    Args:
        samples: completions drawn of a problem.
        right: how many of them pass.
        k: from 1 to samples.

    Raises:
        EvaluateError: counts that cannot be.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1, as the product that does not overflow.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise EvaluateError(f"pass@{k} of {right} right among {samples}: draw at least k samples")
    missed = 1.0
    for count in range(samples - right + 1, samples + 1):
        missed *= max(0.0, 1 - k / count)
    return 1 - missed
