"""Check that the built book has a page for every chapter in _toc.yml, slides where it has them, and an entrance."""

import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
SMALLEST = 1000  # bytes; a page of the theme has tens of thousands


def expected_pages() -> list[Path]:
    """The pages that the table of contents promises, and the entrance."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    names = [Path(file).relative_to("book") for file in [toc["root"], *chapters]]
    pages = [SITE / "index.html", *(SITE / name.with_suffix(".html") for name in dict.fromkeys(names))]
    return pages + [SITE / name.parent / "slides" / f"{name.name}.html" for name in names if has_slides(name)]


def has_slides(name: Path) -> bool:
    """Whether an author has marked cells of a chapter for slides."""
    file = ROOT / "book" / name.with_suffix(".ipynb")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else []
    return any(cell["metadata"].get("slideshow") for cell in cells)


def main() -> int:
    """Name the pages that are missing or empty. Returns the exit status."""
    pages = expected_pages()
    wrong = [page for page in pages if not page.is_file() or page.stat().st_size < SMALLEST]
    for page in wrong:
        print(f"missing or empty: {page.relative_to(ROOT)}")
    print(f"{len(pages) - len(wrong)} of {len(pages)} pages of the book are in {SITE.relative_to(ROOT)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
