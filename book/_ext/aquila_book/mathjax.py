"""Formulas without a network: MathJax comes from a Python package and is copied into the site."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.errors import ExtensionError

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PACKAGE = "django-static-mathjax"  # a plain copy of MathJax 3.2 (Apache-2.0); it needs no Django
FILES = ("es5/tex-svg.js", "es5/input/tex/extensions", "LICENSE")


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder unless the copy is there already."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)


def _add_mathjax(app: Sphinx) -> None:
    """Copy what the pages load: TeX input, SVG output (which needs no font files), and the licence."""
    if app.builder.format != "html":
        return
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise ExtensionError(
            f"formulas need the package {PACKAGE}: install the book's requirements with `pip install -e '.[book]'`"
        ) from None
    for name in FILES:
        source = Path(str(package.locate_file(f"mathjax/static/mathjax/{name}")))
        _copy(source, Path(app.outdir) / "_static/mathjax" / name.removeprefix("es5/"))


def setup(app: Sphinx) -> None:
    """Copy MathJax once the builder is known."""
    app.connect("builder-inited", _add_mathjax)
