"""How pytest reads the notebooks: stored outputs are compared, images are not."""

import pytest

# nbval leaves out PNG and JPEG by itself. The book's figures are SVG, whose text differs with matplotlib's version.
IMAGES = ("image/svg+xml", "image/png", "image/jpeg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell nbval's notebooks to leave images out of the comparison."""
    for notebook in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        notebook.skip_compare = (*notebook.skip_compare, *IMAGES)
