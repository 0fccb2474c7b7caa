"""The token viewer in the built book, as a reader uses it: from a file, without a kernel and without a network."""

import functools
import re
from pathlib import Path

import pytest

SITE = Path(__file__).resolve().parents[2] / "_build/html"
WORDS = {"en": ("Type or paste a text", "Control tokens", "tokens"), "zh": ("输入或粘贴一段文字", "控制词元", "个词元")}
GOLDEN = {"Hello, world!": [22299, 12, 3117, 1], "北京的十大景点是什么?": [42072, 16565, 17613, 5428, 31]}


class Reader:
    """A page opened from a file; what it asked for outside the site and what went wrong is kept."""

    def __init__(self, browser, language, width=1280, scheme="light", **context):
        self.context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme, **context)
        self.page = self.context.new_page()
        self.asked, self.errors = [], []
        self.page.route("**/*", self._gate)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.goto(f"{SITE.as_uri()}/{language}/tokenization.html", wait_until="load")
        self.viewer = self.page.locator(".token-viewer")

    def _gate(self, route):
        self.asked.append(route.request.url)
        inside = route.request.url.startswith((SITE.as_uri(), "data:"))
        route.continue_() if inside else route.abort()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()

    def ids(self):
        return [int(text) for text in self.viewer.locator(".token sub").all_inner_texts()]

    def settle(self, ids):
        """Wait until the viewer shows these ids."""
        self.page.wait_for_function(
            "ids => ids === [...document.querySelectorAll('.token-viewer .token sub')].map(e => e.textContent).join()",
            arg=",".join(map(str, ids)),
            timeout=10_000,
        )


@pytest.fixture
def reader(browser):
    if not (SITE / "en/tokenization.html").is_file():
        pytest.skip("the chapter on tokenization is not built: make book")
    return functools.partial(Reader, browser)


@pytest.mark.parametrize("language", WORDS)
def test_typing_shows_the_tokens(reader, language):
    label, _, unit = WORDS[language]
    with reader(language) as seen:
        assert not [url for url in seen.asked if "aquila_vocab" in url], "the vocabulary is loaded before it is needed"
        area = seen.viewer.get_by_label(label)
        for text, ids in GOLDEN.items():
            area.fill(text)
            seen.settle(ids)
            assert unit in seen.viewer.locator("output").inner_text()
            assert str(len(ids)) in seen.viewer.locator("output").inner_text()
        area.fill("")
        area.press_sequentially("Hello, world!")
        seen.settle(GOLDEN["Hello, world!"])
        assert not seen.errors
        assert not [url for url in seen.asked if not url.startswith((SITE.as_uri(), "data:"))]


@pytest.mark.parametrize("language", WORDS)
def test_control_tokens_count_only_when_the_text_is_trusted(reader, language):
    with reader(language) as seen:
        seen.viewer.get_by_role("button", name=WORDS[language][1]).click()
        seen.page.wait_for_function("document.querySelector('.token-viewer textarea').value.includes('</s>')")
        seen.page.wait_for_function("document.querySelectorAll('.token-viewer .token').length > 10")
        assert not seen.viewer.locator(".control").count()
        seen.viewer.get_by_role("checkbox").check()
        seen.settle([100000, 22299, 1, 100001, 23017, 1, 100007])
        assert seen.viewer.locator(".control").count() == 3
        seen.viewer.get_by_role("checkbox").uncheck()
        seen.page.wait_for_function("!document.querySelector('.token-viewer .control')")


@pytest.mark.parametrize("language", WORDS)
def test_the_keyboard_reaches_everything(reader, language):
    with reader(language) as seen:
        seen.viewer.locator("textarea").focus()
        kinds = []
        for _ in range(7):
            kinds.append(seen.page.evaluate("document.activeElement.tagName"))
            seen.page.keyboard.press("Tab")
        assert kinds == ["TEXTAREA", *["BUTTON"] * 5, "INPUT"]


@pytest.mark.parametrize("language", WORDS)
def test_without_scripts_the_first_tokens_stand_there(reader, language):
    with reader(language, java_script_enabled=False) as seen:
        assert len(seen.ids()) > 5
        assert re.search(r"\d\.\d\d", seen.viewer.locator(".counts").inner_text())
        assert seen.viewer.locator(".token").first.evaluate("e => getComputedStyle(e).display") == "inline-block"


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_it_fits_a_phone_and_follows_dark_mode(reader, language, width, scheme):
    with reader(language, width=width, scheme=scheme) as seen:
        seen.viewer.locator("textarea").fill("x" * 200 + " " + "字" * 200)
        seen.page.wait_for_function("document.querySelectorAll('.token-viewer .token').length > 50")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width + 1
        ink = seen.viewer.locator("textarea").evaluate("e => getComputedStyle(e).color")
        grounds = seen.viewer.evaluate(
            """e => { const found = []; for (; e; e = e.parentElement) found.push(getComputedStyle(e).backgroundColor);
                      return found; }"""
        )
        paper = next(colour for colour in grounds if colour not in ("rgba(0, 0, 0, 0)", "transparent"))
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] - light[1] > 300) if scheme == "dark" else (light[1] - light[0] > 300)
