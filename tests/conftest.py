"""Fixtures of more than one test file."""

import shutil

import pytest
from tuning_runs import some_base, some_conversations
from widget_pages import opened, page_of


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    from aquila2_tut.show import plots

    bundles = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model, for fine-tuning runs."""
    return some_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of conversations to fine-tune it on."""
    return some_conversations(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no Chromium on this machine; on Debian and Ubuntu: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_stored(chromium, tmp_path):
    """Opens a widget's stored output, (html, width of the window), as the book's pages have it, from a file."""
    pytest.importorskip("sphinx", reason="the book's requirements are not installed: make setup")
    pages = []

    def open_page(stored, width=1280):
        file = tmp_path / f"{len(pages)}.html"
        file.write_text(page_of(stored), encoding="utf-8")
        pages.append(opened(chromium, file.as_uri(), width))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()
