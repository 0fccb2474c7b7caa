"""The readers on archives made here, against what was put into them; on the real ones, against published counts."""

import inspect
import io
import json
import pydoc
import string
import struct
import tarfile
import textwrap
import unicodedata
import zlib

import pytest
import regex

from aquila2_tut import assets
from aquila2_tut.data import SOURCES, DataError, documents, readers


def ar(members: dict[str, bytes]) -> bytes:
    """An ar archive, member by member as ar(5) says."""
    data = b"!<arch>\n"
    for name, content in members.items():
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        data += b"\n" * (len(content) % 2)
    return data


def deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    odd = b"control, of odd length."
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": odd, f"data.tar.{compression}": box.getvalue()})


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_debian_package(tmp_path, compression):
    files = {"usr/b.html": b"<p>b", "usr/a.html": b"<p>a", "usr/a.js": b"no"}
    (tmp_path / "a.deb").write_bytes(deb(files, compression))
    assert list(readers.deb_files(tmp_path / "a.deb", ".html")) == [("usr/b.html", b"<p>b"), ("usr/a.html", b"<p>a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "is not a Debian package: it does not begin with"),
        (ar({"debian-binary": b"2.0\n"}), "has no member data.tar"),
        (ar({"data.tar.xz": b"no archive at all"}), "its files cannot be read"),
        (deb({"usr/a.html": bytes(range(256)) * 99})[:-200], "its files cannot be read"),
    ],
)
def test_what_is_no_debian_package(tmp_path, content, message):
    (tmp_path / "a.deb").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(readers.deb_files(tmp_path / "a.deb", ".html"))


PAGE = """<html><body><header><p>LibreOffice 7.4 Help</p></header>
<div id="DisplayArea" itemprop="softwareHelp">
<h1 id="hd_1" dir="auto">Cut &amp; Paste</h1>
<p id="par_1" class="paragraph"><a name="x"></a><span class="avis">Cuts  the
 text.</span> Use <img src="a.svg" alt="an icon">it.</p>
<div class="howtoget"><p class="howtogetheader">To access this command...</p></div>
<p id="par_2">Press <span class="switchinline"><span hidden="true" id="MACa_1" class="MAC"><b>Command</b>
</span><span hidden="true" id="defaulta_1"><span class="key">Ctrl</span></span></span>+<span class="emph">X</span>.</p>
<span class="switch"><span hidden="true" class="WRITER"><p id="par_3">In Writer.</p></span></span>
<p id="par_4"><span class="switchinline"><span class="CALC">Cells</span><span class="DRAW">Shapes</span></span></p>
<p id="par_5"> <img src="b.svg"> </p>
<pre id="bas_1"><code class="language-visual-basic">Sub Main
  Print "é &lt; 1"
End Sub
</code></pre>
<p class="related">Related Topics</p>
<table><tr><td><p id="par_6">7</p></td></tr></table>
</div><div id="SearchFrame"></div><footer><p>This page is: x</p></footer></body></html>"""


def test_a_help_page():
    assert readers.help_paragraphs(PAGE) == [
        ("hd_1", "Cut & Paste"),
        ("par_1", "Cuts the text. Use it."),
        ("par_2", "Press Ctrl+X."),
        ("par_3", "In Writer."),
        ("par_4", "Cells"),
        ("bas_1", 'Sub Main\n  Print "é < 1"\nEnd Sub'),
        ("par_6", "7"),
    ]


def test_a_page_without_a_body():
    assert readers.help_paragraphs("<html><body><p>a frame</p></body></html>") == []


def r_vector(strings: list[str | None], version: int = 3) -> bytes:
    """A character vector in XDR serialisation, compressed as a block of an .rdb."""
    block = b"X\n" + struct.pack(">III", version, 0x040201, 0x030500)
    if version == 3:
        block += struct.pack(">I", 5) + b"UTF-8"
    block += struct.pack(">II", 16, len(strings))
    for text in strings:
        content = (text or "").encode()
        block += struct.pack(">Ii", 0x40009, -1 if text is None else len(content)) + content
    return struct.pack(">I", len(block)) + zlib.compress(block)


def test_r_strings():
    first, second = ["EMMA", "", None, "naïve 中文"], ["x"] * 300
    database = r_vector(first) + r_vector(second, version=2)
    assert readers.r_string_vectors(database) == [["EMMA", "", "", "naïve 中文"], second]


def test_another_r_object_is_refused():
    numbers = b"X\n" + struct.pack(">III", 2, 0x040201, 0x020300) + struct.pack(">IId", 14, 1, 0.5)
    with pytest.raises(DataError, match="not a character vector"):
        readers.r_string_vectors(struct.pack(">I", len(numbers)) + zlib.compress(numbers))
    with pytest.raises(DataError, match="the block at byte 0 has"):
        readers.r_string_vectors(struct.pack(">I", 7) + zlib.compress(numbers))


def test_chapters():
    novel = """\
        A NOVEL

        By Nobody

        VOLUME I

        CHAPTER I

        It was _very_ late. At _the
        end of the evening_ it rained.

        Nobody came.
        CHAPTER II
        Chapter and verse were quoted.

        FINIS

        A licence that nobody reads."""
    assert readers.chapters(textwrap.dedent(novel).splitlines()) == [
        "Chapter i\nIt was very late. At the end of the evening it rained.\nNobody came.",
        "Chapter ii\nChapter and verse were quoted.",
    ]


def test_docstrings_are_read_not_run():
    source = '''"""The module."""
raise SystemExit("this was run")
class A(B):
    """A class."""
    def f(self, x: int = 1, *, y) -> str:
        """A method.

            indented
        the end
        """
    def _hidden(self):
        """Nobody's interface."""
async def g(): "A coroutine."
def silent(): pass
'''
    assert readers.docstrings(source).split("\n\n") == [
        "The module.",
        "class A\nA class.",
        "def f(self, x: int=1, *, y)\nA method.",
        "    indented\nthe end",
        "def g()\nA coroutine.",
    ]


@pytest.fixture(scope="module")
def library():
    return dict(readers.standard_library())


@pytest.mark.parametrize("module", [string, textwrap, json])
def test_the_standard_library_against_python_itself(library, module):
    text = library[module.__name__]
    assert text.startswith(inspect.getdoc(module).strip())
    public = [
        value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__ and inspect.getdoc(value)
    ]
    assert public
    for value in public:
        if inspect.isfunction(value):
            assert inspect.getdoc(value).strip() in text


def test_help_topics_against_pydoc():
    import pydoc_data.topics

    found = dict(readers.help_topics())
    assert found == {name: text.strip() for name, text in pydoc_data.topics.topics.items()}
    assert set(found) & set(pydoc.Helper.keywords)


def test_a_poem():
    assert (
        readers.poem("阳关引", "寇准", ["塞草烟光阔。", "渭水波声咽。"]) == "阳关引　寇准\n塞草烟光阔。\n渭水波声咽。"
    )
    # A stage direction in half-width brackets, a stray full stop, quotation marks of a typewriter.
    assert (
        readers.poem("单刀会・新水令", "关汉卿", ['(云)他道"善哉"！。', "去也。(唱)。"])
        == "单刀会·新水令　关汉卿\n（云）他道“善哉”！\n去也。\n（唱）"
    )
    # The first line's words stand in the title, up to where the line was full.
    assert readers.poem("尾・春去也，人归", "佚名", ["何处？"]) == "尾　佚名\n春去也，人归何处？"


@pytest.mark.parametrize(
    ("title", "paragraphs"),
    [
        ("定风波", ["浦映□花花映浦。"]),
        ("定风波", ["浦映け花。"]),
        ("定风波", ["浦映\ufffd花。"]),
        ("定风波", []),
        ("", ["浦映花。"]),
        ("□□□", ["莺未老。"]),
    ],
)
def test_a_damaged_poem(title, paragraphs):
    assert readers.poem(title, "佚名", paragraphs) is None


def test_a_damaged_name():
    assert readers.poem("临江仙", "赵必□", ["莺未老。"]) is None
    assert readers.poem("临江仙", "王炎2", ["莺未老。"]) == "临江仙　王炎\n莺未老。"


# --- the real archives -----------------------------------------------------------------------------------------------


def real(source: str) -> list:
    try:
        return list(documents(source))
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")


def test_every_chapter_of_every_novel():
    """The numbers of chapters are those of the printed books; in Northanger Abbey's two volumes they run on."""
    novels = [document.id.rpartition("/")[0] for document in real("austen")]
    assert {novel: novels.count(novel) for novel in dict.fromkeys(novels)} == {
        "emma": 55,
        "mansfield-park": 48,
        "northanger-abbey": 31,
        "persuasion": 24,
        "pride-and-prejudice": 61,
        "sense-and-sensibility": 50,
    }


def test_the_text_of_a_novel_is_whole():
    """All words of the R strings between the first chapter and the end, counted without the reader of chapters."""
    text = " ".join(document.text for document in real("austen") if document.id.startswith("pride-and-prejudice/"))
    data = next(content for _, content in readers.deb_files(assets.path("jane-austen"), "/data/Rdata.rdb"))
    lines = next(lines for lines in readers.r_string_vectors(data) if lines[0] == "PRIDE AND PREJUDICE")
    words = regex.findall(r"\w+", " ".join(lines[lines.index("Chapter 1") :]).replace("_", ""))
    assert regex.findall(r"\w+", text) == words
    assert "It is a truth universally acknowledged, that a single man in possession" in text


def is_writing(character: str) -> bool:
    """Whether Unicode calls it an ideograph or a punctuation mark, of those that poems are printed with."""
    kind = unicodedata.name(character, "")
    foreign = kind.startswith(("ASTERISK", "PRESENTATION FORM"))
    return kind.startswith(("CJK", "IDEOGRAPHIC")) or (unicodedata.category(character)[0] == "P" and not foreign)


@pytest.mark.parametrize(("source", "slack"), [("songci", 5), ("yuanqu", 250)])
def test_the_poems_that_are_left(source, slack):
    """In the Yuan collection some were dropped for dashes and signs of markup, which are punctuation too."""
    found = real(source)
    if source == "songci":
        files = readers.json_members(assets.path("song-ci"))
        raw = [entry for name, entries in files if "2019y" not in name for entry in entries]
    else:
        raw = json.loads(assets.path("yuan-qu").read_text(encoding="utf-8"))
    texts = [(entry.get("title") or entry["rhythmic"]) + "".join(entry["paragraphs"]) for entry in raw]
    names = [entry["author"].rstrip("0123456789") for entry in raw]
    whole = [text for text, name in zip(texts, names, strict=True) if all(map(is_writing, text + name))]
    assert 0 <= len(whole) - len(found) <= slack
    for count in (len(found), len(raw)):
        assert all(f"{count:,}" in what for what in SOURCES[source].what.values())
    assert not [document.id for document in found if regex.search(r"[□\ufffd\p{Kana}\p{Hira}\p{Cyrl}]", document.text)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_help_is_text(language):
    found = real(f"libreoffice-{language}")
    assert 1900 < len(found) <= 2560
    for document in found:
        assert not regex.search(r"</?(span|div|p)\b|To access this command|Related Topics", document.text)
    if language == "zh":
        characters = "".join(document.text for document in found)
        assert len(regex.findall(r"\p{Han}", characters)) > 0.6 * len(regex.findall(r"\w", characters))
