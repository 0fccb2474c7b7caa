"""Fixtures of more than one test file."""

import pytest
from tuning_runs import some_base, some_conversations


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
