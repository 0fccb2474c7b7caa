"""What is published of the real pretraining runs, against arithmetic of its own and against each other."""

import pytest

from aquila2_tut.config import PRESETS, Aquila2Config
from aquila2_tut.train.published import published_runs

RUNS = published_runs()


@pytest.mark.parametrize("run", RUNS.values(), ids=str)
def test_the_run_fits_the_model(run):
    assert run.model in PRESETS
    config = Aquila2Config.preset(run.model)
    assert run.length == config.max_position_embeddings
    assert config.num_hidden_layers % run.pipeline_parallel == config.num_attention_heads % run.tensor_parallel == 0
    assert run.gpus % (run.tensor_parallel * run.pipeline_parallel) == 0
    assert set(run.sources) == {"configuration", "cluster", "rate and mfu", "peak"}


def test_both_saw_the_two_trillion_tokens_that_baai_speaks_of():
    for run in RUNS.values():
        assert run.tokens == pytest.approx(2e12, rel=0.03)
        assert run.steps * run.batch_tokens == pytest.approx(run.tokens)


def test_gpu_hours_are_those_of_one_gpu():
    run = RUNS["Aquila2-34B"]
    assert run.gpu_hours * 3600 * 666 == pytest.approx(2e12)


def test_the_published_utilization_is_that_of_seven_billion_parameters():
    """It is reproduced to its last digit with 7.00 billion, and is not with the 7.30 that the model has."""
    run = RUNS["Aquila2-7B"]
    assert round(run.utilization(7e9), 3) == run.mfu
    assert round(run.utilization(7_295_537_152), 3) != run.mfu


def test_six_operations_a_parameter_and_token():
    assert RUNS["Aquila2-34B"].flops(1) == 6 * 488281250 * 4096
