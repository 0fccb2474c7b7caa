"""The rules of the house: which way imports point, what the package may not use, how long a function is."""

import ast
import re
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "aquila2_tut"
# A room may import the rooms above it. modelhub and locate are the two steps of the loader.
ORDER = [
    "terminal",
    "assets",
    "gguf",
    "config",
    "tokenizer",
    "chat",
    "data",
    "model",
    "quant",
    "train",
    "memory",
    "longcontext",
    "evaluate",
    "show",
    "modelhub",
    "locate",
    "loader",
    "cli",
]
ALLOWED_OF_ROOM = {("model", "chat"): "aquila2_tut.chat.generate"}  # of chat, the model takes one mixin
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}
EXEC_IS_THE_JOB = {"evaluate/cage.py"}  # runs programs that a model wrote, in a process of their own

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in FILES}


def where(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every module that a file imports, anywhere in it, by its full name."""
    package = ["aquila2_tut", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node, f"{name}.{alias.name}") for alias in node.names)


def test_every_module_has_its_place_in_the_order():
    strangers = [str(file.relative_to(PACKAGE)) for file in FILES if room(file) not in {*ORDER, "__init__"}]
    assert not strangers, f"not in the order of rooms (tests/test_house.py): {strangers}"


def test_imports_point_up():
    wrong = []
    for file in FILES:
        here = room(file)
        for node, name in imported(file):
            parts = name.split(".")
            if here == "__init__" or parts[0] != "aquila2_tut" or len(parts) < 2 or parts[1] not in ORDER:
                continue
            allowed = ALLOWED_OF_ROOM.get((here, parts[1]), "aquila2_tut")
            if ORDER.index(parts[1]) > ORDER.index(here) or not f"{name}.".startswith(f"{allowed}."):
                wrong.append(f"{where(file, node)} imports {name}, which room {here} may not")
    assert not wrong, "\n".join(wrong)


def test_no_pickle_no_remote_code_no_eval():
    wrong = []
    for file in FILES:
        wrong += [f"{where(file, n)} imports {m}" for n, m in imported(file) if m.split(".")[0] in FORBIDDEN_MODULES]
        for node in ast.walk(TREES[file]):
            if isinstance(node, ast.Call):
                wrong += [f"{where(file, node)} {fault}" for fault in call_faults(node, file)]
    assert not wrong, "\n".join(wrong)


def call_faults(call: ast.Call, file: Path) -> Iterator[str]:
    name = ast.unparse(call.func)
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in FORBIDDEN_CALLS and file.relative_to(PACKAGE).as_posix() not in EXEC_IS_THE_JOB:
        yield f"calls {name}"
    remote = arguments.get("trust_remote_code")
    if remote is not None and not (isinstance(remote, ast.Constant) and remote.value is False):
        yield "passes trust_remote_code"
    weights_only = arguments.get("weights_only")
    if name == "torch.load" and not (isinstance(weights_only, ast.Constant) and weights_only.value is True):
        yield "calls torch.load without weights_only=True"


@dataclass
class Function:
    """A function of the package, however deep, and how many lines of code it has."""

    file: Path
    node: ast.FunctionDef | ast.AsyncFunctionDef
    name: str
    public: bool
    lines: int


def functions() -> list[Function]:
    return [function for file in FILES for function in functions_in(TREES[file], file, "", True, code_lines(file))]


def functions_in(node: ast.AST, file: Path, prefix: str, public: bool, code: set[int]) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from functions_in(child, file, prefix, public, code)
            continue
        name = prefix + child.name
        is_function = not isinstance(child, ast.ClassDef)
        is_public = public and (not child.name.startswith("_") or child.name == "__call__")
        if is_function:
            lines = len(code & set(range(child.lineno, child.end_lineno + 1)) - docstring_lines(child))
            yield Function(file, child, name, is_public, lines)
        # What is defined inside a function is nobody's interface.
        yield from functions_in(child, file, f"{name}.", is_public and not is_function, code)


def code_lines(file: Path) -> set[int]:
    """Numbers of the lines that hold code: not blank, not only a comment."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with file.open("rb") as stream:
        spans = [
            (token.start[0], token.end[0])
            for token in tokenize.tokenize(stream.readline)
            if token.type not in skip | {tokenize.ENCODING}
        ]
    return {line for first, last in spans for line in range(first, last + 1)}


def docstring_lines(node: ast.AST) -> set[int]:
    if ast.get_docstring(node) is None:
        return set()
    return set(range(node.body[0].lineno, node.body[0].end_lineno + 1))


def is_overload(node: ast.AST) -> bool:
    names = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return bool(names & {"overload", "setter"})


def test_public_names_have_docstrings():
    wrong = [
        f"{where(file, node)} class {node.name}"
        for file in FILES
        for node in TREES[file].body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    wrong += [
        f"{where(f.file, f.node)} {f.name}"
        for f in functions()
        if f.public and not ast.get_docstring(f.node) and not is_overload(f.node)
    ]
    wrong += [f"{where(file, TREES[file])} the module" for file in FILES if not ast.get_docstring(TREES[file])]
    assert not wrong, "without a docstring:\n" + "\n".join(wrong)


def test_every_function_is_annotated():
    wrong = [
        f"{where(f.file, f.node)} {f.name}: {', '.join(missing)}"
        for f in functions()
        if f.public and (missing := missing_annotations(f.node))
    ]
    assert not wrong, "without an annotation:\n" + "\n".join(wrong)


def missing_annotations(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(extra for extra in (a.vararg, a.kwarg) if extra)]
    missing = [arg.arg for arg in every if arg.annotation is None and arg.arg not in ("self", "cls")]
    return missing + ([] if node.returns is not None else ["the result"])


def test_functions_are_short():
    every = sorted(functions(), key=lambda f: f.lines)
    lengths = [f.lines for f in every]
    median, ninth = statistics.median(lengths), lengths[int(0.9 * (len(lengths) - 1))]
    longest = "\n".join(f"{where(f.file, f.node)} {f.name}: {f.lines} lines" for f in every[:-11:-1])
    assert median <= 12, f"half of the functions have more than {median} lines of code; the longest:\n{longest}"
    assert ninth <= 30, f"one function in ten has more than {ninth} lines of code; the longest:\n{longest}"


ROOT = PACKAGE.parent


def test_pyproject_names_lower_bounds_only():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.findall(r'"[\w.-]+==[^"]*"', text), "exact versions belong in constraints.txt"


def test_constraints_are_exact_and_fit_every_platform():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line)]
    assert not wrong, f"constraints.txt: {wrong} should be name==version, without a local suffix such as +cpu"
