"""The teaching loop against AdamW and plain cross-entropy written out, and runs that are interrupted."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from aquila2_tut import Aquila2Config, Aquila2ForCausalLM
from aquila2_tut.data import pack_stream
from aquila2_tut.train import TrainError
from aquila2_tut.train.checkpoints import UNFINISHED, checkpoints, written_whole
from aquila2_tut.train.loop import Settings, batches, learning_rate, train

SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32}


def small_model(seed=0):
    torch.manual_seed(seed)
    return Aquila2ForCausalLM(Aquila2Config(**SHAPE, **IDS, num_attention_heads=4, num_key_value_heads=2))


def some_rows(count=12, length=24, seed=0):
    dice = np.random.default_rng(seed)
    texts = [dice.integers(3, 61, dice.integers(4, 30)).tolist() for _ in range(count * 2)]
    return [row for row in pack_stream(texts, length) if len(row.input_ids) == length][:count]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_learning_rate_is_that_of_transformers(name):
    settings = Settings(steps=50, warmup=7, learning_rate=0.3, final_share=0.0, schedule=name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[name]
    # transformers' first step stands still; ours is the second of a warm-up that is as long
    theirs = make(optimizer, 7, 50)
    for step in range(50):
        if step >= 7:
            assert learning_rate(settings, step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert learning_rate(settings, 6) == 0.3
    assert learning_rate(dataclasses.replace(settings, final_share=0.1), 50) == pytest.approx(0.03)


def test_every_row_comes_once_before_any_comes_again():
    rows, settings = some_rows(count=12), Settings(batch_size=2, accumulation=2)
    seen = [
        tuple(ids.tolist())
        for step in range(3)
        for part in batches(rows, settings, step, 0)
        for ids in part["input_ids"]
    ]
    assert sorted(seen) == sorted(tuple(row.input_ids.tolist()) for row in rows)
    again = [
        tuple(ids.tolist())
        for step in range(3, 6)
        for part in batches(rows, settings, step, 0)
        for ids in part["input_ids"]
    ]
    assert sorted(again) == sorted(seen) and again != seen


def test_a_step_is_adamw_on_the_mean_cross_entropy():
    rows, settings = some_rows(), Settings(steps=3, batch_size=2, accumulation=3, warmup=2, clip=0.5)
    ours, reference = small_model(), small_model()
    log = train(ours, rows, settings)
    matrices = [p for p in reference.parameters() if p.ndim >= 2]
    others = [p for p in reference.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(3):
        # all rows of the step at once, in float64 logits: no accumulation, no chunks
        parts = list(batches(rows, settings, step, 0))
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        logits = reference(whole["input_ids"], document_ids=whole["document_ids"]).logits
        labels = whole["labels"]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert log[step].loss == pytest.approx(loss.item(), rel=1e-5)
        assert log[step].tokens == (labels[:, 1:] != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert log[step].gradient_norm == pytest.approx(norm.item(), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
    for name, theirs in reference.named_parameters():
        torch.testing.assert_close(weights(ours)[name], theirs.detach(), rtol=1e-4, atol=1e-5)


def test_the_loss_begins_near_the_logarithm_of_the_vocabulary_and_falls():
    log = train(small_model(), some_rows(), Settings(steps=60, batch_size=4, learning_rate=1e-2))
    assert log[0].loss == pytest.approx(math.log(61), abs=0.05)
    assert log[-1].loss < log[0].loss - 0.5


@pytest.mark.parametrize("stops", [[4], [2, 5], [1, 2, 3, 4, 5, 6, 7]])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stops):
    rows, settings = some_rows(), Settings(steps=8, batch_size=2, accumulation=2, warmup=2, save_every=1)
    undisturbed = small_model()
    whole = train(undisturbed, rows, settings)

    class Stop(Exception):
        pass

    for number, stop in enumerate(
        stops
    ):  # only the first begins with weights; the others must take those that were kept

        def end(step, stop=stop):
            if step.step > stop:
                raise Stop

        with pytest.raises(Stop):
            train(small_model(seed=number), rows, settings, tmp_path, end)
    resumed = small_model(seed=99)
    assert train(resumed, rows, settings, tmp_path) == whole
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True))


def test_a_folder_that_was_never_finished_is_not_taken_up(tmp_path):
    class Killed(BaseException):
        pass

    with pytest.raises(Killed), written_whole(tmp_path / "checkpoint-5") as place:
        (place / "weights.safetensors").write_bytes(b"half")
        raise Killed
    assert checkpoints(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED + "checkpoint-5"]
    log = train(small_model(), some_rows(), Settings(steps=1, batch_size=2, save_every=1), tmp_path)
    assert len(log) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_checkpoints_are_counted_as_numbers(tmp_path):
    for step in (9, 100, 20):
        with written_whole(tmp_path / f"checkpoint-{step}"):
            pass
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_other_settings_are_refused(tmp_path):
    settings = Settings(steps=2, batch_size=2, save_every=1)
    train(small_model(), some_rows(), settings, tmp_path)
    with pytest.raises(TrainError, match=r"checkpoint-2 .*learning_rate=0.001, not 0.1"):
        train(small_model(), some_rows(), dataclasses.replace(settings, learning_rate=0.1), tmp_path)


def test_a_loss_that_is_no_number_ends_the_run():
    model = small_model()
    torch.nn.init.constant_(model.model.norm.weight, math.inf)
    with pytest.raises(TrainError, match="step 1: the loss is nan"):
        train(model, some_rows(), Settings(steps=2, batch_size=2))


def test_bad_settings():
    with pytest.raises(TrainError, match="no rows"):
        train(small_model(), [], Settings())
    with pytest.raises(TrainError, match="'step' is not one of cosine, linear, constant"):
        train(small_model(), some_rows(), Settings(schedule="step", warmup=0, steps=1))


def test_frozen_weights_stay_and_are_not_saved(tmp_path):
    model = small_model()
    before = weights(model)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    train(model, some_rows(), Settings(steps=2, batch_size=2, save_every=2), tmp_path)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved and all("q_proj" in name for name in moved)
    size = (tmp_path / "checkpoint-2" / "weights.safetensors").stat().st_size
    assert size < 2 * (4 * 2 * 16 * 16) + 1000
