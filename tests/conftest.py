"""Fixtures of more than one test file."""

import pytest


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    from aquila2_tut.show import plots

    bundles = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles
