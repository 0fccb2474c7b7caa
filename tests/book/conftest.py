"""The book's own modules, and the built site in a browser that may not reach anything else."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
SITE = ROOT / "_build/html"


def load(path):
    """Import a file of book/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"book_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def parity():
    return load(BOOK / "parity.py")


@pytest.fixture(scope="session")
def build():
    return load(BOOK / "build.py")


@pytest.fixture(scope="session")
def hooks():
    """The Sphinx hooks, as a package."""
    pytest.importorskip("sphinx_book_theme", reason="the book's requirements are not installed: make setup")
    sys.path.insert(0, str(BOOK / "_ext"))
    try:
        import aquila_book
    finally:
        sys.path.pop(0)
    return aquila_book


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: Debian's, or another that is installed. Nothing is downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no Chromium on this machine; on Debian and Ubuntu: apt install chromium")
    if not (SITE / "en/index.html").is_file():
        pytest.skip("the book is not built: make book")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"],
        )
        yield chromium
        chromium.close()
