"""The configuration of each language, derived from the root's, and what the build says when it cannot build."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def chapters(toc):
    return [c["file"] for part in toc["parts"] for c in part["chapters"]]


def test_both_languages_have_the_same_chapters_in_the_same_order(build, monkeypatch):
    monkeypatch.setattr(build, "find_chapter", lambda name, language: BOOK)
    english, chinese = (build.derive_toc(TOC, language) for language in ("en", "zh"))
    assert chapters(english) == chapters(chinese)
    assert [len(p["chapters"]) for p in english["parts"]] == [len(p["chapters"]) for p in chinese["parts"]]


def test_every_page_is_in_the_table_of_contents():
    listed = {*chapters(TOC), TOC["root"]}
    there = {f"book/{p.parent.name}/{p.stem}" for s in ("md", "ipynb") for p in BOOK.glob(f"[ez][nh]/*.{s}")}
    assert there == listed


def test_a_missing_chapter_is_named(build):
    toc = {"parts": [{"caption": "x", "chapters": [{"file": "book/en/no-such-chapter"}]}]}
    with pytest.raises(build.BuildError, match=r"no-such-chapter\.ipynb"):
        build.derive_toc(toc, "en")


def test_the_languages_differ_only_where_they_should(build):
    english, chinese = (build.derive_config(CONFIG, language) for language in ("en", "zh"))
    assert english["repository"]["path_to_book"] == "book/en"
    assert chinese["repository"]["path_to_book"] == "book/zh"
    assert chinese["sphinx"]["config"]["language"] == "zh_CN"
    assert english["launch_buttons"] == chinese["launch_buttons"] == CONFIG["launch_buttons"]
    assert english["sphinx"]["config"]["mathjax_path"] == chinese["sphinx"]["config"]["mathjax_path"]


def test_merging_goes_key_by_key(build):
    assert build.merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}}) == {"a": {"b": 1, "c": 4}, "d": 3}


def test_notebooks_are_not_run_by_the_build():
    assert CONFIG["execute"]["execute_notebooks"] == "off"


@pytest.mark.slow
def test_a_warning_stops_the_build_and_names_the_page(tmp_path):
    for name in ("_config.yml", "_toc.yml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for folder in ("_ext", "_templates", "_style"):
        (tmp_path / "book").mkdir(exist_ok=True)
        (tmp_path / "book" / folder).symlink_to(BOOK / folder)
    for name in ("build.py", "glossary.yml"):
        (tmp_path / "book" / name).write_text((BOOK / name).read_text(encoding="utf-8"), encoding="utf-8")
    for chapter in {*chapters(TOC), TOC["root"]}:
        page = tmp_path / f"{chapter}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text("# A page\n\nSome words.\n", encoding="utf-8")
    broken = tmp_path / "book/zh/faq.md"
    broken.write_text("# A page\n\n{ref}`nowhere`\n", encoding="utf-8")
    run = subprocess.run([sys.executable, "book/build.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "book/zh/faq.md" in run.stderr
    assert "nowhere" in run.stderr
    broken.write_text("# A page\n", encoding="utf-8")
    run = subprocess.run([sys.executable, "book/build.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "_build/html/zh/faq.html").is_file()
    assert (tmp_path / "_build/html/index.html").is_file()
