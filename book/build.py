#!/usr/bin/env python3
"""Build the book: one site a language under _build/html/{en,zh}, and an index.html that sends a reader to theirs.

    python book/build.py            # builds what has changed; --fresh builds everything anew

The configuration of each language is derived from _config.yml and _toc.yml, which `jupyter-book build .` also reads.
Notebooks are shown with the outputs they were committed with. Any warning of Sphinx is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
LANGUAGES = ("en", "zh")
PACKAGES = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "pydata-sphinx-theme", "sphinx-exercise")

# Sphinx's lines: what is shown as progress, and what is dropped; all else (warnings, errors) is shown as it is.
COLOUR = re.compile(r"\x1b\[[\d;]*m")
PROGRESS = re.compile(r"(reading|writing) (?:sources|output)\.\.\. (\[ *\d+%\]) (.+)")
CHATTER = re.compile(
    r"Running Sphinx|loading|making output|myst(-nb)? v|Using jupyter-cache|sphinx-multitoc|building \[|updating env|"
    r"reading sources|writing (output|additional)|looking for|pickling|checking consistency|preparing|copying|dumping|"
    r"generating|build succeeded|build finished|done$|none found|no targets|highlighting|\[(new|config|ext)|\d+ added|"
    r"The HTML pages are|(gen)?index|search",
    re.IGNORECASE,
)


class BuildError(RuntimeError):
    """The book could not be built."""


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `extra` laid over it, key by key."""
    both = dict(base)
    for key, value in extra.items():
        both[key] = merge(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def derive_toc(toc: dict[str, Any], language: str) -> dict[str, Any]:
    """Return the table of contents of one language, with names relative to its folder.

    Raises:
        BuildError: when a chapter that the table names is not there, or no chapter is of this language.
    """
    prefix = f"book/{language}/"
    parts = []
    for part in toc["parts"]:
        names = [c["file"].removeprefix(prefix) for c in part["chapters"] if c["file"].startswith(prefix)]
        chapters = [{"file": name} for name in names if name != "index"]
        if chapters:
            parts.append({**part, "chapters": chapters})
    if not parts:
        raise BuildError(f"_toc.yml names no chapter of {prefix}")
    for name in ["index", *(c["file"] for p in parts for c in p["chapters"])]:
        if not find_chapter(name, language):
            raise BuildError(f"_toc.yml names {prefix}{name}, but there is no {name}.md and no {name}.ipynb there")
    return {"format": "jb-book", "root": "index", "parts": parts}


def find_chapter(name: str, language: str) -> Path | None:
    """Return the source of a chapter, or None."""
    return next((p for s in (".ipynb", ".md") if (p := BOOK / language / f"{name}{s}").is_file()), None)


def derive_config(config: dict[str, Any], language: str) -> dict[str, Any]:
    """Return the configuration of one language: the root's, with paths made absolute and the language's words."""
    settings = config["sphinx"]["config"]["aquila_languages"][language]
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    twins = sorted(p.stem for p in (BOOK / language).iterdir() if find_chapter(p.stem, other))
    return merge(
        config,
        {
            "title": settings["title"],
            "logo": str(ROOT / config["logo"]),
            "html": {"favicon": str(ROOT / config["html"]["favicon"])},
            "repository": {"path_to_book": f"book/{language}"},
            "sphinx": {
                "local_extensions": {"aquila_book": str(BOOK / "_ext")},
                "config": merge(settings["sphinx"], {"aquila_language": language, "aquila_twins": twins}),
            },
        },
    )


def digest(paths: list[Path], *more: object) -> str:
    """Return a hash of the files' names and contents, of `more`, and of the versions of what builds the book."""
    state = hashlib.sha256(repr(more).encode())
    state.update(repr([(name, importlib.metadata.version(name)) for name in PACKAGES]).encode())
    for path in sorted(paths):
        state.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def files_under(*folders: Path) -> list[Path]:
    """Return the files of some folders, without caches."""
    hidden = ("__pycache__", ".ipynb_checkpoints", "_build")
    return [p for f in folders for p in f.rglob("*") if p.is_file() and not set(hidden) & set(p.parts)]


class Site:
    """One language's site: its derived configuration, where it is built, and what it was last built from."""

    def __init__(self, language: str, out: Path) -> None:
        self.language = language
        self.out = out
        self.place = out / "html" / language  # where readers find it
        self.work = out / ".book" / language  # where Sphinx works; a build that fails leaves the last good site alone
        config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
        toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
        self.config, self.toc = derive_config(config, language), derive_toc(toc, language)
        widgets = ROOT / "aquila2_tut/show/widgets"
        self.frame = digest(files_under(BOOK / "_ext", BOOK / "_templates", widgets), self.config, self.toc)
        self.state = digest(files_under(BOOK / language, BOOK / "_style"), self.frame, self._shared())

    def _shared(self) -> bytes:
        glossary = BOOK / "glossary.yml"
        return glossary.read_bytes() if glossary.is_file() else b""

    def built_from(self) -> dict[str, str]:
        """Return the hashes of the last build that succeeded."""
        stamp = self.work / "built.json"
        return json.loads(stamp.read_text()) if stamp.is_file() and (self.place / "index.html").is_file() else {}

    def start(self) -> subprocess.Popen[bytes]:
        """Write the derived configuration and start the build in a process of its own (Sphinx is not thread-safe)."""
        fresh = self.built_from().get("frame") != self.frame  # Sphinx does not notice a changed hook or template
        if fresh:
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "built.json").unlink(missing_ok=True)
        (self.work / "_config.yml").write_text(yaml.safe_dump(self.config, allow_unicode=True), encoding="utf-8")
        (self.work / "_toc.yml").write_text(yaml.safe_dump(self.toc, allow_unicode=True), encoding="utf-8")
        command = [sys.executable, __file__, "--sphinx", self.language, "--out", str(self.out)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Print the build's progress, and every warning and error, each line marked with the language."""
        for raw in process.stdout or ():
            line = COLOUR.sub("", raw.decode("utf-8", "replace")).strip()
            if step := PROGRESS.match(line):
                print(f"{self.language}: {step[1]:7} {step[2]} {step[3]}", flush=True)
            elif line and not CHATTER.match(line):
                print(f"{self.language}: {line}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Check that every page is there, put the site in its place, and remember what it was built from."""
        names = ["index", *(c["file"] for p in self.toc["parts"] for c in p["chapters"])]
        if missing := [n for n in names if not (self.work / f"html/{n}.html").is_file()]:
            raise BuildError(f"Sphinx reported no error, but wrote no page for {', '.join(missing)} ({self.language})")
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.work / "html", self.place)
        (self.work / "built.json").write_text(json.dumps({"frame": self.frame, "state": self.state}))

    def run_sphinx(self) -> int:
        """Build in this process. Returns 0 when every page was built without a warning."""
        from jupyter_book.sphinx import build_sphinx

        result = build_sphinx(
            str(BOOK / self.language),
            str(self.work / "html"),
            noconfig=True,
            path_config=str(self.work / "_config.yml"),
            doctreedir=str(self.work / "doctrees"),
            confoverrides={"latex_individualpages": False, "external_toc_path": str(self.work / "_toc.yml")},
            warningiserror=True,
            keep_going=True,
        )
        return 1 if isinstance(result, BaseException) else int(result or 0)


def write_entrance(out: Path, config: dict[str, Any]) -> None:
    """Write _build/html/index.html, which sends a reader to the language they chose last or their browser speaks."""
    page = (BOOK / "_templates/entrance.html").read_text(encoding="utf-8")
    for language, settings in config["sphinx"]["config"]["aquila_languages"].items():
        page = page.replace(f"@title-{language}@", settings["title"])
    (out / "html/index.html").write_text(page, encoding="utf-8")
    shutil.copy2(BOOK / "_style/favicon.svg", out / "html/favicon.svg")
    (out / "html/.nojekyll").touch()  # without it GitHub Pages hides the folders that begin with _


def build(out: Path, fresh: bool) -> None:
    """Build what has changed, both languages at once.

    Raises:
        BuildError: when a site could not be built; Sphinx's own messages stand above it.
    """
    began = time.monotonic()
    if fresh:
        for folder in (out / "html", out / ".book"):
            shutil.rmtree(folder, ignore_errors=True)
    sites = [Site(language, out) for language in LANGUAGES]
    stale = [s for s in sites if s.built_from().get("state") != s.state]
    for site in sites:
        print(f"{site.language}: {'building' if site in stale else 'nothing has changed'}", flush=True)
    running = [(site, site.start()) for site in stale]
    watchers = [threading.Thread(target=site.watch, args=(process,)) for site, process in running]
    for watcher in watchers:
        watcher.start()
    failed = [site.language for site, process in running if process.wait() != 0]
    for watcher in watchers:
        watcher.join()
    if failed:
        raise BuildError(f"the book was not built ({' and '.join(failed)}): see the warnings and errors above")
    for site in stale:
        site.finish()
    write_entrance(out, yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8")))
    index = out / "html/index.html"
    print(f"\nThe book is ready ({time.monotonic() - began:.1f} s): open {index}\nin a browser: {index.as_uri()}")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_build", help="the build folder (default: _build)")
    parser.add_argument("--fresh", action="store_true", help="build everything anew")
    parser.add_argument("--sphinx", choices=LANGUAGES, help=argparse.SUPPRESS)  # the worker process of one language
    args = parser.parse_args(argv)
    try:
        if args.sphinx:
            return Site(args.sphinx, args.out.resolve()).run_sphinx()
        build(args.out.resolve(), args.fresh)
    except BuildError as error:
        print(f"\nbook/build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
