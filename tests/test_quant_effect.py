"""What the chapter on quantization claims: by its data file, and on one layer of a model, so that it can fail."""

import pytest
import torch

from aquila2_tut import AutoLoader
from aquila2_tut.data import corpus
from aquila2_tut.quant import awq, calibrate, gptq, inputs_of, measured, output_error, round_to_nearest

FOUND = measured("effect")
MODELS = list(FOUND["models"])
KINDS = ("english", "chinese", "python")


def formats(model):
    return {row["name"]: row for row in FOUND["models"][model]["formats"]}


def test_both_models_are_there_and_one_was_rounded_before():
    assert set(MODELS) == {"Aquila2-Nano", "SmolLM2-135M"}
    assert "Q4_1" in FOUND["about"], "that SmolLM2's float32 was rounded before must be said"


@pytest.mark.parametrize("model", MODELS)
def test_the_file_says_what_its_figures_depend_on(model):
    known = FOUND["models"][model]["conditions"]
    assert {"date", "python", "torch", "transformers", "calibration", "intervals"} <= set(known)


@pytest.mark.parametrize("model", MODELS)
def test_every_figure_has_an_interval_and_a_count(model):
    counts = FOUND["models"][model]["counts"]
    for row in FOUND["models"][model]["formats"]:
        for kind in KINDS:
            for figure in (row[kind], row[f"{kind}_change"]):
                assert figure["low"] <= figure["value"] <= figure["high"], (row["name"], kind)
        for kind, choice in row["choice"].items():
            right = choice["value"] * counts["choice"][kind]
            assert right == pytest.approx(round(right), abs=0.02), (row["name"], kind)  # a count over a count
            assert choice["low"] < choice["value"] < choice["high"]
    assert min(counts[kind]["texts"] for kind in KINDS) >= 20


@pytest.mark.parametrize("model", MODELS)
def test_a_change_is_the_difference_of_two_figures(model):
    rows = formats(model)
    for row in rows.values():
        for kind in KINDS:
            apart = row[kind]["value"] - rows["fp32"][kind]["value"]
            assert row[f"{kind}_change"]["value"] == pytest.approx(apart, abs=2e-4), (row["name"], kind)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_costs_fewer_bits_per_byte_than_rounding_to_nearest(model, bits):
    rows = formats(model)
    if f"gptq-{bits}" not in rows:
        pytest.skip(f"{model} was not measured in {bits} bits")
    for kind in KINDS:
        assert rows[f"gptq-{bits}"][kind]["value"] < rows[f"rtn-{bits}"][kind]["value"], kind


@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_has_the_smaller_error_in_every_linear_map(bits):
    errors = FOUND["models"]["Aquila2-Nano"]["layers"]["errors"]
    better = torch.tensor(errors[f"gptq-{bits}"]) < torch.tensor(errors[f"rtn-{bits}"])
    assert better.all(), f"not in {(~better).sum()} of {better.numel()}"


@pytest.mark.parametrize("model", MODELS)
def test_fewer_bits_cost_more(model):
    rows = formats(model)
    for method in ("rtn", "gptq", "awq"):
        names = [name for name in (f"{method}-{bits}" for bits in (4, 3, 2)) if name in rows]
        costs = [rows[name]["english_change"]["value"] for name in names]
        assert costs == sorted(costs), method
        if "bits" in FOUND["models"][model]:
            errors = [FOUND["models"][model]["bits"][f"{method}-{bits}"] for bits in (8, 4, 3, 2)]
            assert errors == sorted(errors), method


@pytest.mark.parametrize("model", MODELS)
def test_eight_bits_cost_little_and_one_scale_for_all_more(model):
    rows = formats(model)
    for kind in KINDS:
        assert abs(rows["int8"][f"{kind}_change"]["value"]) < 0.015 * rows["fp32"][kind]["value"]
        assert rows["int8-tensor"][f"{kind}_change"]["low"] > 0
        assert rows["int8-tensor"][kind]["value"] > rows["int8"][kind]["value"]


@pytest.fixture(scope="module")
def layer():
    """A linear map of Aquila2-Nano, inputs to calibrate with, and inputs of another text."""
    loader = AutoLoader("aquila2", "Aquila2-Nano", device="cpu", torch_dtype="float32", local_files_only=True)
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    sources = ("jupyterlab-en", "jupyterlab-zh", "dialogues-en", "dialogues-zh")  # those of every installation
    texts = ["\n\n".join(document.text for document in corpus(split, sources)) for split in ("train", "held-out")]
    ids = [torch.tensor([tokenizer(text, verbose=False)["input_ids"][:1500]]) for text in texts]
    seen, others = (inputs_of(model, "mlp.up_proj", one)[4] for one in ids)
    return model.model.layers[4].mlp.up_proj.weight.detach(), seen, others


@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_keeps_the_outputs_for_a_text_that_it_has_not_seen(layer, bits):
    weight, seen, others = layer
    inputs = calibrate([seen])
    wanted = others @ weight.T
    lost = {
        name: (others @ rounded.T - wanted).norm().item()
        for name, rounded in {
            "rtn": round_to_nearest(weight, bits).values(),
            "awq": awq(weight, inputs, bits),
            "gptq": gptq(weight, inputs.hessian, bits).values(),
        }.items()
    }
    assert lost["gptq"] < 0.9 * lost["rtn"]
    assert lost["awq"] < 1.01 * lost["rtn"]


def test_the_file_s_errors_are_those_that_this_layer_has(layer):
    weight, seen, _ = layer
    hessian = calibrate([seen]).hessian
    stored = FOUND["models"]["Aquila2-Nano"]["bits"]
    assert (stored["layer"], stored["map"]) == (4, "mlp.up_proj")
    for bits in (2, 3, 4, 8):
        rounded = round_to_nearest(weight, bits, 128).values()
        # other texts, so not the same to the last digit
        assert output_error(weight, rounded, hessian) ** 0.5 == pytest.approx(stored[f"rtn-{bits}"], rel=0.1)
