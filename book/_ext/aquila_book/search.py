"""Search in both languages: Chinese by single characters and pairs of characters, English by Porter stems.

Sphinx cuts Chinese pages into dictionary words when it builds the index, but the browser does not cut the query, so a
term of two words finds nothing. Pairs of neighbouring characters need no dictionary and are the same on both sides.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sphinx.search.en import SearchEnglish

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUN = re.compile(rf"(?P<han>[{HAN}]+)|[^\W{HAN}]+")

SPLIT_QUERY = f"""
function splitQuery(query) {{
  const words = [];
  for (const [run] of query.matchAll(/[{HAN}]+|(?:(?![{HAN}])[\\p{{L}}\\p{{N}}_])+/gu)) {{
    if (run.length === 1 || !/[{HAN}]/.test(run)) words.push(run);
    else for (let i = 0; i + 1 < run.length; i++) words.push(run.slice(i, i + 2));
  }}
  return words;
}}
"""


def _terms(run: str) -> Iterator[str]:
    """Every character of a run of Chinese, and every pair of neighbours."""
    yield from run
    yield from (run[i : i + 2] for i in range(len(run) - 1))


class BilingualSearch(SearchEnglish):
    """Sphinx's English search (stop words, stemming), with Chinese text indexed as characters and pairs."""

    lang = "zh"
    language_name = "Chinese and English"
    js_splitter_code = SPLIT_QUERY

    def split(self, input: str) -> list[str]:
        """Return the index terms of a text, in order."""
        words: list[str] = []
        for match in _RUN.finditer(input):
            words.extend(_terms(match[0]) if match["han"] else [match[0]])
        return words


def setup(app: Sphinx) -> None:
    """Put this search in the place of Sphinx's Chinese one."""
    app.add_search_language(BilingualSearch)
