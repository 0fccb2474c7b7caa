#!/usr/bin/env python3
"""Run the notebooks of the book in place and store their outputs, or check what is stored.

    python book/run_notebooks.py                 # every notebook of both languages
    python book/run_notebooks.py quickstart      # that chapter in both languages
    python book/run_notebooks.py --check [FILE]  # run nothing; say what is wrong with the stored outputs

Each runs in its own folder, as a reader runs it. A notebook whose run fails is left as it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_TIMEOUT = 600  # seconds
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError)


def find_notebooks(names: list[str]) -> list[Path]:
    """Return the notebooks of both languages, or those among them that have one of the names.

    Args:
        names: chapters ("quickstart") or files ("book/en/quickstart.ipynb"); empty for all.

    Raises:
        SystemExit: a name fits no notebook.
    """
    every = sorted(BOOK.glob("[ez][nh]/*.ipynb"))
    chosen = {name: [p for p in every if name == p.stem or Path(name).resolve() == p] for name in names}
    if unknown := [name for name, found in chosen.items() if not found]:
        known = ", ".join(sorted({p.stem for p in every})) or "none yet"
        raise SystemExit(f"There is no notebook {', '.join(unknown)}. The chapters that are notebooks: {known}.")
    return [p for p in every if not names or any(p in found for found in chosen.values())]


def tidy(notebook: NotebookNode) -> None:
    """Drop what differs from one machine or run to the next and says nothing to a reader."""
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        cell.metadata.pop("collapsed", None)
        for output in cell.get("outputs", []):  # a live widget needs its kernel; the HTML stored beside it does not
            output.get("data", {}).pop(WIDGET_VIEW, None)
    notebook.metadata.pop("widgets", None)


def run(path: Path) -> None:
    """Run one notebook in its folder and write its outputs back.

    Raises:
        CellExecutionError, CellTimeoutError, DeadKernelError: a cell failed; the file is unchanged.
    """
    notebook = nbformat.read(path, as_version=4)
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # the kernel warns of loopback TCP on the terminal
        on_cell_executed=lambda cell, **_: show_progress(path, cell.get("execution_count"), count),
    )
    client.execute()
    tidy(notebook)
    fresh = path.with_suffix(".ipynb.new")
    nbformat.write(notebook, fresh)
    os.replace(fresh, path)


def show_progress(path: Path, done: int | None, count: int) -> None:
    """Keep one line on a terminal up to date; silent where the output goes to a file."""
    if sys.stderr.isatty():
        print(f"\r{path.relative_to(BOOK)}: cell {done or '?'} of {count}", end="\033[K", file=sys.stderr, flush=True)


def find_faults(path: Path) -> list[str]:
    """Return what is wrong with a notebook as it is stored, one sentence a fault."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (ValueError, nbformat.ValidationError) as error:
        return [f"is not a valid notebook: {str(error).splitlines()[0]}"]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    faults = [fault for n, cell in enumerate(cells, start=1) for fault in find_cell_faults(n, cell)]
    if notebook.metadata.get("kernelspec", {}).get("name") != KERNEL["name"]:
        faults.append("names another kernel than python3")
    return faults


def find_cell_faults(number: int, cell: NotebookNode) -> list[str]:
    """Return what is wrong with one stored code cell, the `number`-th of its notebook."""
    faults = []
    if cell.execution_count != number:
        faults.append(f"code cell {number} was not run in order (its count is {cell.execution_count})")
    if any(output.output_type == "error" for output in cell.outputs) and "raises-exception" not in tags(cell):
        faults.append(f"code cell {number} stores an error, and is not tagged raises-exception")
    if any(output.get("name") == "stderr" for output in cell.outputs):
        faults.append(f"code cell {number} stores text on stderr (a warning or a progress bar)")
    if any(WIDGET_VIEW in output.get("data", {}) for output in cell.outputs):
        faults.append(f"code cell {number} stores a live widget, which no page can show")
    return faults


def tags(cell: NotebookNode) -> list[str]:
    """Return the tags of a cell."""
    return cell.metadata.get("tags", [])


def check_all(paths: list[Path]) -> int:
    """Print the faults of the stored notebooks. Returns how many notebooks have one."""
    faulty = 0
    for path in paths:
        faults = find_faults(path)
        faulty += bool(faults)
        for fault in faults:
            print(f"{path.relative_to(BOOK.parent)}: {fault}")
    print(f"{len(paths) - faulty} of {len(paths)} notebooks are as they should be")
    return faulty


def run_all(paths: list[Path]) -> int:
    """Run the notebooks one after another. Returns how many failed."""
    failed = 0
    for path in paths:
        began = time.monotonic()
        try:
            run(path)
        except FAILURES as error:
            failed += 1
            print(f"\r{path.relative_to(BOOK)}: FAILED, left as it was\n{error}", flush=True)
        else:
            print(f"\r{path.relative_to(BOOK)}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"{len(paths) - failed} of {len(paths)} notebooks ran")
    return failed


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CHAPTER", help="chapters or files; all without one")
    parser.add_argument("--check", action="store_true", help="run nothing, check the stored outputs")
    arguments = parser.parse_args(argv)
    paths = find_notebooks(arguments.names)
    return 1 if (check_all if arguments.check else run_all)(paths) else 0


if __name__ == "__main__":
    sys.exit(main())
