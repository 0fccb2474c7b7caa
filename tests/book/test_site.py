"""The built site as a reader meets it: in a browser, with every request beyond the site refused."""

import functools
import http.server
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).resolve().parents[2] / "_build/html"
PAGES = sorted(p.stem for p in (SITE / "en").glob("*.html") if p.stem not in ("genindex", "search"))
LANGUAGES = {"en": ("en", "zh-CN"), "zh": ("zh-CN", "en")}
CHINESE_TERMS = [
    "显存",
    "分组查询注意力",
    "梯度检查点",
    "低秩适配",
    "旋转位置编码",
    "因果掩码",
    "注意力头",
    "困惑度",
    "提示词",
    "词表",
    "存",  # one character
    "KV 缓存",
    "aquila2教程",  # no space between the two
]
ENGLISH_TERMS = ["quantization", "quantized", "attention", "grouped-query", "tokenizers", "Aquila2"]
SEARCH_BOXES = ".search-button__button, input[type=search]"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class Visit:
    """One page in one browser window; what it asked for elsewhere and what went wrong is kept."""

    def __init__(self, browser, url, width=1280, scheme="light", **context):
        self.context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme, **context)
        self.page = self.context.new_page()
        self.outside, self.errors = [], []
        site = SITE.as_uri() if url.startswith("file:") else "/".join(url.split("/")[:3])
        self.page.route("**/*", functools.partial(self._gate, (site, "data:", "blob:")))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.goto(url, wait_until="load")

    def _gate(self, inside, route):
        if route.request.url.startswith(inside):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()

    def assert_quiet(self):
        self.page.wait_for_timeout(300)
        assert not self.outside, "the page asks for something outside the site"
        assert not self.errors

    def visible(self, selector):
        return [e for e in self.page.locator(selector).all() if e.is_visible()]


@pytest.fixture
def visit(browser):
    return functools.partial(Visit, browser)


def search(seen, term):
    seen.page.goto(seen.page.url.rsplit("/", 1)[0] + f"/search.html?q={term}")
    seen.page.wait_for_function("document.querySelector('#search-results .search-summary')?.innerText.length > 0")
    return [a.get_attribute("href") for a in seen.page.locator("#search-results ul.search li > a").all()]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_whole(visit, address, language, page, scheme):
    with visit(f"{address}/{language}/{page}.html", scheme=scheme) as seen:
        seen.assert_quiet()
        assert seen.page.locator("html").get_attribute("lang") == LANGUAGES[language][0]
        assert seen.page.locator("html").get_attribute("data-theme") == scheme
        assert len(seen.visible(SEARCH_BOXES)) == 1
        assert seen.page.locator("article img:not([alt]), article img[alt='']").count() == 0
        assert seen.page.locator("article svg.book-figure:not([aria-label])").count() == 0
        assert not seen.page.get_by_text("Math input error").count()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES)
def test_every_page_fits_a_phone(visit, address, language, page):
    with visit(f"{address}/{language}/{page}.html", width=390) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 391
        assert len(seen.visible(SEARCH_BOXES)) == 1
        boxes = [
            e.bounding_box()
            for e in seen.visible(".language-switch, .bd-header-article .article-header-buttons button")
        ]
        middles = [box["y"] + box["height"] / 2 for box in boxes]
        assert max(middles) - min(middles) < 6, "the language switch is not in line with the buttons"


@pytest.mark.parametrize("page", [*PAGES, "search", "genindex"])
def test_the_switch_leads_to_the_same_page_and_back(visit, address, page):
    with visit(f"{address}/en/{page}.html") as seen:
        for language in ("zh", "en"):
            seen.page.locator(".language-switch").click()
            seen.page.wait_for_url(f"**/{language}/{page}.html")
            assert seen.page.locator("html").get_attribute("lang") == LANGUAGES[language][0]


def test_the_switch_is_a_plain_link(visit, address):
    with visit(f"{address}/zh/index.html", java_script_enabled=False) as seen:
        link = seen.page.locator("a.language-switch")
        assert (link.get_attribute("hreflang"), link.get_attribute("lang")) == ("en", "en")
        assert seen.page.locator("head link[rel=alternate][hreflang=en]").get_attribute("href") == "../en/index.html"
        link.click()
        seen.page.wait_for_url("**/en/index.html")


def test_the_switch_keeps_the_place(visit, address):
    with visit(f"{address}/en/glossary.html#some-place") as seen:
        seen.page.locator(".language-switch").click()
        seen.page.wait_for_url("**/zh/glossary.html#some-place")


@pytest.mark.parametrize(("locale", "language"), [("zh-CN", "zh"), ("zh-TW", "zh"), ("en-GB", "en"), ("fr-FR", "en")])
def test_the_entrance_knows_the_readers_language(visit, address, locale, language):
    with visit(f"{address}/index.html", locale=locale) as seen:
        seen.page.wait_for_url(f"**/{language}/index.html")


def test_the_entrance_remembers_a_choice(visit, address):
    with visit(f"{address}/en/index.html", locale="en-GB") as seen:
        seen.page.locator(".language-switch").click()
        seen.page.wait_for_url("**/zh/index.html")
        seen.page.goto(f"{address}/index.html")
        seen.page.wait_for_url("**/zh/index.html")


def test_the_entrance_works_without_javascript(visit, address):
    with visit(f"{address}/index.html", java_script_enabled=False) as seen:
        assert len(seen.visible("a[hreflang]")) == 2


def test_chinese_terms_are_found(visit, address):
    with visit(f"{address}/zh/index.html") as seen:
        missing = [term for term in CHINESE_TERMS if not search(seen, term)]
        assert not missing
        assert not search(seen, "鲸鱼座流星雨"), "a term that is nowhere must not be found"


def test_english_terms_are_found(visit, address):
    with visit(f"{address}/en/index.html") as seen:
        missing = [term for term in ENGLISH_TERMS if not search(seen, term)]
        assert not missing
        seen.assert_quiet()


def test_the_search_page_has_one_box(visit, address):
    for width in (1280, 390):
        with visit(f"{address}/zh/search.html?q=显存", width=width) as seen:
            assert len(seen.visible(SEARCH_BOXES)) == 1


def test_the_book_works_from_a_folder(visit):
    with visit(f"{SITE.as_uri()}/zh/index.html") as seen:
        seen.assert_quiet()
        assert search(seen, "分组查询注意力")
        seen.assert_quiet()
        seen.page.locator(".language-switch").click()
        seen.page.wait_for_url("**/en/search.html**")
        seen.page.goto(f"{SITE.as_uri()}/index.html")
        seen.page.wait_for_url("**/index.html")
        seen.assert_quiet()


def test_formulas_are_set_without_a_network(visit):
    pages = [p for p in sorted((SITE / "zh").glob("*.html")) if 'class="math' in p.read_text(encoding="utf-8")]
    if not pages:
        pytest.skip("no page has a formula yet")
    with visit(pages[0].as_uri()) as seen:
        seen.page.wait_for_selector("mjx-container svg")
        seen.assert_quiet()


def test_figures_follow_dark_mode(visit):
    pages = [p for p in sorted((SITE / "zh").glob("*.html")) if 'class="book-figure"' in p.read_text(encoding="utf-8")]
    if not pages:
        pytest.skip("no page has a figure yet")
    seen_colours = []
    for scheme in ("light", "dark"):
        with visit(pages[0].as_uri(), scheme=scheme) as seen:
            words = seen.page.locator("svg.book-figure text").first
            seen_colours.append(words.evaluate("e => getComputedStyle(e).fill"))
    assert seen_colours[0] != seen_colours[1]


def test_theme_words_are_chinese(visit, address):
    with visit(f"{address}/zh/{PAGES[-1]}.html") as seen:
        words = seen.page.evaluate(
            """() => [...document.querySelectorAll('body *')].flatMap(e => ['title', 'aria-label', 'placeholder',
               'data-bs-title', 'data-bs-original-title', 'data-tooltip'].map(a => e.getAttribute(a)))
               .filter(w => w && /[a-z]{4}/i.test(w) && !/[\\u4e00-\\u9fff]/.test(w))"""
        )
        assert not set(words) - {"English"}
