"""Two languages: which one a page is in, where its twin is, and the theme's words in the reader's language."""

from __future__ import annotations

import gettext
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydata_sphinx_theme
import sphinx
import sphinx_book_theme
import yaml
from sphinx.locale import get_translator

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.config import Config

Context = dict[str, Any]

TAGS = {"en": "en", "zh": "zh-CN"}  # the BCP 47 tag of each language
WORDS = yaml.safe_load((Path(__file__).parent / "words.yml").read_text(encoding="utf-8"))
_ONE_SITE = re.compile(r"book/(en|zh)/")


class _Words(gettext.NullTranslations):
    """The book's own translations, for what the theme's catalogues leave in English."""

    def gettext(self, message: str) -> str:
        return WORDS["messages"].get(message, message)


def language_of(config: Config, page: str) -> str:
    """Return "en" or "zh": the language of the build, or in a build of both the folder that the page is in."""
    match = _ONE_SITE.match(page)
    return config.aquila_language or (match[1] if match else "en")


def _twin(app: Sphinx, page: str, language: str, other: str) -> str:
    """Return the address, from this page, of the same page in the other language, or of that language's cover."""
    up = "../" * page.count("/")
    if app.config.aquila_language:
        here = page in app.config.aquila_twins or page in ("search", "genindex")
        return f"{up}../{other}/{page if here else 'index'}.html"
    twin = page.replace(f"book/{language}/", f"book/{other}/", 1)
    known = twin != page and twin in app.env.found_docs
    return f"{up}{twin if known else f'book/{other}/index'}.html"


def _chinese_catalogues() -> gettext.NullTranslations:
    """Return Sphinx's, the theme's and the book's Chinese words as one catalogue."""
    theme = Path(sphinx_book_theme.__file__).parent / "theme/sphinx_book_theme/static/locales"
    places = [("booktheme", theme, "zh_CN"), ("sphinx", Path(sphinx.__file__).parent / "locale", "zh_CN")]
    places.append(("sphinx", Path(pydata_sphinx_theme.__file__).parent / "locale", "zh"))
    words = _Words()
    for domain, folder, language in reversed(places):
        catalogue = gettext.translation(domain, folder, languages=[language], fallback=True)
        catalogue.add_fallback(words)
        words = catalogue
    return words


def _use_own_words(app: Sphinx) -> None:
    """In the Chinese build, answer what the catalogues do not know."""
    if app.config.language.startswith("zh"):
        for catalogue in ("sphinx", "booktheme"):
            get_translator(catalogue).add_fallback(_Words())


def _page_context(app: Sphinx, page: str, _template: str, context: Context, _tree: nodes.document | None) -> None:
    """Give the templates the page's language, and its twin's address and name."""
    language = language_of(app.config, page)
    other = "zh" if language == "en" else "en"
    context["language"] = TAGS[language]
    context["book_languages"] = app.config.aquila_languages
    context["book_language"], context["other_language"] = language, other
    context["other_tag"], context["twin"] = TAGS[other], _twin(app, page, language, other)
    context["say"] = lambda key: WORDS["book"][key][language]
    if language == "zh" and not app.config.aquila_language:
        context["gettext"] = _chinese_catalogues().gettext
        context["theme_toc_title"], context["theme_search_bar_text"] = "本页目录", "搜索"


def _drop_thebe(_app: Sphinx, _page: str, _template: str, context: Context, _tree: nodes.document | None) -> None:
    """Drop the scripts of thebe, which the book does not use and which would name a CDN on every page."""
    scripts = context.get("script_files", [])
    context["script_files"] = [
        s for s in scripts if "thebe" not in f"{getattr(s, 'filename', s)}{getattr(s, 'attributes', '')}".lower()
    ]


def _translate_fixed_words(app: Sphinx, error: Exception | None) -> None:
    """Translate in the written Chinese pages the few words that the theme's templates hold as plain text."""
    if error or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        page = path.relative_to(app.outdir).with_suffix("").as_posix()
        if language_of(app.config, page) == "zh" and not page.startswith("_"):
            before = after = path.read_text(encoding="utf-8")
            for english, chinese in WORDS["fixed"].items():
                after = after.replace(english, chinese)
            if after != before:
                path.write_text(after, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register the hooks."""
    app.connect("builder-inited", _use_own_words)
    app.connect("html-page-context", _page_context, priority=400)  # before the theme renders its components
    app.connect("html-page-context", _drop_thebe, priority=900)  # after every extension has added its scripts
    app.connect("build-finished", _translate_fixed_words)
