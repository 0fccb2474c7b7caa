"""Fine-tuning from a recipe: three methods, switches, runs that are killed or must stop, scripts, several processes.

Upstream's defects (its fine-tuning script on conversations): labels lost by the legacy template, by a question at the
end and by a separator inside an answer, and templates that it refused, are tested in test_upstream_defects.py; the rest
is here, under "what upstream's script got wrong".
"""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM
from tuning_runs import NANO, PLAIN, small_tuning, some_base, some_conversations

from aquila2_tut import Aquila2ForCausalLM, AutoLoader, cli, load_tokenizer
from aquila2_tut.chat import get_template
from aquila2_tut.data import collate, encode_conversation
from aquila2_tut.data.conversations import read_conversations
from aquila2_tut.memory.formula import tuning_memory
from aquila2_tut.train import TrainError, Tuning, causal_loss, finetune, finetuning
from aquila2_tut.train.checkpoints import UNFINISHED, checkpoints
from aquila2_tut.train.finetuning import keep_four_bits, open_base, tunable
from aquila2_tut.train.plan import dry_run, trainable_parameters
from aquila2_tut.train.recipe import FOLDER, load_recipe
from aquila2_tut.train.tuner import Tuner
from aquila2_tut.train.tuning import METHODS
from aquila2_tut.train.tuning_data import tuning_data

ROOT = Path(__file__).resolve().parent.parent
LONG = {"steps": 30, "save_every": 30, "learning_rate": 3e-2}
IDS = torch.tensor([[8190, 300, 301, 302, 5, 6, 7]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return some_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return some_conversations(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture
def tuners(monkeypatch):
    """The Trainers of the runs of a test."""
    made = []

    class Noted(Tuner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(finetuning, "Tuner", Noted)
    return made


def losses(tuner, name="loss"):
    return [entry[name] for entry in tuner.state.log_history if name in entry]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


# --- the three methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_what_it_leaves_answers_alike(base, data, tmp_path, tuners, method):
    target = finetune(small_tuning(base, data, method=method, targets=("all-linear",), **LONG), tmp_path, AutoLoader)
    said = losses(tuners[0])
    assert len(said) == 30 and sum(said[-3:]) < 0.8 * sum(said[:3])
    place = {"full": {"model_name": str(target)}, "lora": {"lora_dir": target}, "qlora": {"qlora_dir": target}}[method]
    loader = AutoLoader("aquila2", **{"model_name": str(base), "torch_dtype": "float32", **place})
    loaded = loader.get_model()
    keep_four_bits(loaded)
    torch.testing.assert_close(logits(loaded), logits(tuners[0].model), rtol=1e-5, atol=1e-5)
    assert loader.get_tokenizer()("Hello").input_ids == load_tokenizer(NANO)("Hello").input_ids
    assert not [file for file in target.iterdir() if file.suffix in (".bin", ".pt", ".pth")]


def test_an_adapter_loads_in_peft_alone_and_means_what_its_matrices_say(base, data, tmp_path):
    target = finetune(small_tuning(base, data), tmp_path, AutoLoader)
    with_peft = logits(PeftModel.from_pretrained(Aquila2ForCausalLM.from_pretrained(base), target))
    by_hand = Aquila2ForCausalLM.from_pretrained(base)
    tensors = load_file(target / "adapter_model.safetensors")
    pairs = [name for name in tensors if name.endswith("lora_A.weight")]
    assert len(pairs) == 2 * 2  # q and v of two layers
    for name in pairs:
        weight = by_hand.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
        with torch.no_grad():
            weight += 16 / 8 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    torch.testing.assert_close(with_peft, logits(by_hand), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(with_peft, logits(Aquila2ForCausalLM.from_pretrained(base)), atol=1e-3)


def test_an_adapter_remembers_the_canonical_name_of_its_base(tmp_path):
    changes = {"steps": 1, "length": 128, "base": "aquila2-nano", "log_every": 1}
    recipe = load_recipe(Tuning, "nano-lora", **changes)
    config = json.loads((finetune(recipe, tmp_path, AutoLoader) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Aquila2-Nano" and config["peft_type"] == "LORA"


def test_qlora_leaves_the_four_bits_alone(base, data, tmp_path, tuners):
    """Also where it is evaluated in between: bitsandbytes then rounds the scales on some CPUs."""
    evaluated = {"eval_share": 0.2, "eval_every": 2}
    finetune(small_tuning(base, data, method="qlora", **evaluated), tmp_path, AutoLoader)
    fresh = AutoLoader("aquila2", model_name=str(base), quantization_config="nf4", torch_dtype="float32").get_model()
    trained = {n.replace("base_layer.", ""): p for n, p in tuners[0].model.base_model.model.named_parameters()}
    packed = 0
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        packed += parameter.dtype == torch.uint8
    assert packed == 2 * 7
    models = (fresh, tuners[0].model)
    states = [[m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)] for model in models]
    assert len(states[0]) == packed
    for one, other in zip(*states, strict=True):
        assert one.nested and other.nested and torch.equal(one.absmax, other.absmax)
    learned = [p for n, p in trained.items() if "lora_" in n]
    assert {p.dtype for p in learned} == {torch.float32} and all(p.requires_grad for p in learned)
    assert sum(p.requires_grad for p in trained.values()) == len(learned) == 8


# --- what upstream's script got wrong --------------------------------------------------------------------------------


def test_what_is_learned_is_told_before_step_one(base, data, tmp_path, capsys):
    """Its rank0_print never printed, as train() set a local variable: nobody saw which labels were lost."""
    finetune(small_tuning(base, data, steps=1), tmp_path, AutoLoader)
    told = capsys.readouterr().err
    shown = re.findall(r"<\|startofpiece\|>(.*?)<\|endofpiece\|>«(.*?)</s>»", told)
    assert told.startswith("The first batch") and len(shown) == 3
    samples = [[turn["value"] for turn in sample["conversations"]] for sample in read_conversations(data)]
    assert all([question, answer] in samples for question, answer in shown)


def test_a_jsonl_file_to_evaluate_on_is_read(base, data, tmp_path, tuners):
    """Its loader never iterated over such a file, and evaluated on the last training sample."""
    other = some_conversations(tmp_path / "eval.jsonl", count=5, seed=1)
    finetune(small_tuning(base, data, eval_data=str(other), eval_every=2), tmp_path / "run", AutoLoader)
    assert len(tuners[0].eval_dataset) == 5
    assert losses(tuners[0], "eval_loss")[-1] == pytest.approx(loss_over_tokens(tuners[0].model, other), rel=1e-5)


def loss_over_tokens(model, file):
    """Every labelled token counts the same, one conversation at a time."""
    total = count = 0
    for sample in read_conversations(file):
        encoded = encode_conversation(sample, load_tokenizer(NANO), "aquila-v1")
        ids, labels = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["labels"])
        with torch.no_grad():
            scores = model.eval()(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(scores, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count


def test_rope_scaling_and_type_of_the_base_are_kept(data, tmp_path, tuners):
    """Its training path dropped both: long contexts were trained unscaled, and weights came in float32."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    long = some_base(tmp_path / "long", rope_parameters=rope)
    finetune(small_tuning(long, data, steps=1, length=256, precision="bfloat16"), tmp_path / "run", AutoLoader)
    model = tuners[0].model
    assert model.config.rope_parameters["factor"] == 2.0
    assert model.get_base_model().model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with pytest.raises(TrainError, match="257 tokens, and the context of .* holds 256"):
        finetune(small_tuning(long, data, length=257), tmp_path / "too long", AutoLoader)


def test_every_template_can_be_trained(base, data):
    """It took only two of them; here all that the vocabulary has the tokens for."""
    tokenizer = load_tokenizer(NANO)
    for name in ("aquila-chat", "aquila", "aquila-legacy", "aquila-v1", "aquila-v2"):
        encoded = tuning_data(small_tuning(base, data, length=128), tokenizer, get_template(name))
        assert encoded.samples[0] == 24 and encoded.learned >= 3 * 24 and not encoded.lost


def test_another_template_than_the_model_is_served_with_is_told():
    """Its 34B script trained aquila-v1 on a model that is asked in aquila-legacy."""
    lines = dry_run(load_recipe(Tuning, "34b-lora", data="about_nano.jsonl"), AutoLoader, tuning_memory)
    assert "careful, AquilaChat2-34B is served with aquila-legacy" in lines[2]
    assert "not on this machine" in lines[1] and "9,338,880 are trained" in lines[0]


def test_the_recipes_have_upstreams_numbers():
    """Source: Aquila2, finetune/{7B,34B}/*.sh."""
    for size in ("7b", "34b"):
        for method, batch in (("full", 4), ("lora", 1), ("qlora", 4)):
            recipe = load_recipe(Tuning, f"{size}-{method}")
            assert recipe.batch_size == batch and recipe.accumulation == 1
            assert (recipe.length, recipe.epochs, recipe.learning_rate) == (2048, 5, 9.65e-6)
            assert (recipe.schedule, recipe.warmup, recipe.weight_decay, recipe.seed) == ("linear", 0.1, 0.1, 42)
            assert (recipe.r, recipe.alpha, recipe.dropout, recipe.targets) == (8, 16, 0.05, ("q_proj", "v_proj"))
            assert recipe.template == "aquila-v1" and recipe.gradient_checkpointing and recipe.method == method


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"chunked_loss": False}, {"packing": True}, {"batch_size": 6, "accumulation": 4}])
def test_switches_that_change_nothing_but_memory_and_time(base, data, tmp_path, tuners, change):
    whole = {"batch_size": 24, "steps": 2, "learning_rate": 1e-3}  # all of the data in each step
    finetune(small_tuning(base, data, **whole), tmp_path / "a", AutoLoader)
    finetune(small_tuning(base, data, **{**whole, **change}), tmp_path / "b", AutoLoader)
    assert losses(tuners[1]) == pytest.approx(losses(tuners[0]), rel=1e-5)
    packed = change.get("packing", False)
    assert len(tuners[1].train_dataset) < 12 if packed else len(tuners[1].train_dataset) == 24


def llama_with_adapters(base, recipe):
    """What transformers and peft make of the same weights and dice."""
    config = json.loads((base / "config.json").read_text()) | {"model_type": "llama"}
    llama = LlamaForCausalLM(LlamaConfig(**config))
    llama.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    llama.tie_weights()
    torch.manual_seed(recipe.seed)
    options = {"r": recipe.r, "lora_alpha": recipe.alpha, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", **options)).train()


def test_packed_rows_teach_what_padded_batches_of_llama_do(base, data):
    recipe = small_tuning(base, data, targets=("all-linear",), packing=True)
    loader = open_base(recipe, AutoLoader)
    ours, theirs = tunable(recipe, loader.get_model(), "tiny"), llama_with_adapters(base, recipe)
    tokenizer = loader.get_tokenizer()
    for model in (ours, theirs):
        with torch.no_grad():  # an adapter begins as nothing, and A would get no gradient
            for _, b in sorted((n, p) for n, p in model.named_parameters() if "lora_B" in n):
                b.copy_(torch.linspace(-0.1, 0.1, b.numel()).view_as(b))
    packed, single = (
        tuning_data(replace(recipe, packing=packing), tokenizer, get_template("aquila-v1")).train
        for packing in (True, False)
    )
    loss = causal_loss(ours, collate(packed, 0))
    items = [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in single]
    expected = theirs(**DataCollatorForSeq2Seq(tokenizer, padding=True)(items)).loss
    assert len(packed) < len(single) / 2 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward(), expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 7 * 2 and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_with_checkpointing(base, data, method):
    gradients, passes = [], []
    for checkpointing in (False, True):
        recipe = small_tuning(base, data, method=method, gradient_checkpointing=checkpointing)
        loader = open_base(recipe, AutoLoader)
        model = tunable(recipe, loader.get_model(), "tiny")
        calls = []
        first = model.get_submodule("model.layers.0" if method == "full" else "base_model.model.model.layers.0")
        # Before, as the second pass ends where the last tensor that is needed has been made.
        first.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        rows = tuning_data(recipe, loader.get_tokenizer(), get_template("aquila-v1")).train[:4]
        causal_loss(model, collate(rows, 0)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        passes.append(len(calls))
    assert passes == [1, 2]  # the layer was run a second time
    assert any(g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_the_b_of_lora_plus_learns_faster(base, data, tmp_path, tuners):
    finetune(small_tuning(base, data, steps=2, lora_plus=16.0, schedule="cosine"), tmp_path, AutoLoader)
    rates = {"A": set(), "B": set()}
    for group in tuners[0].optimizer.param_groups:
        for name, parameter in tuners[0].model.named_parameters():
            if any(parameter is p for p in group["params"]):
                rates["B" if "lora_B" in name else "A"].add(round(group["initial_lr"], 6))
    assert rates == {"A": {0.01}, "B": {0.16}}


def test_kinds_of_adapters(base, data, tmp_path):
    changes = {"rslora": True, "dora": True, "also_train": ("norm",), "targets": ("all-linear",), "r": 4, "alpha": 4}
    target = finetune(small_tuning(base, data, steps=3, **changes), tmp_path, AutoLoader)
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["use_dora"] and config["modules_to_save"] == ["norm"]
    tensors = load_file(target / "adapter_model.safetensors")
    assert sum(name.endswith("lora_magnitude_vector") for name in tensors) == 2 * 7
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}
    assert not torch.equal(tensors["base_model.model.model.norm.weight"], torch.ones(64))


def test_an_optimizer_in_eight_bits(base, data, tmp_path, tuners):
    finetune(small_tuning(base, data, method="full", optimizer="adamw-8bit", steps=4), tmp_path, AutoLoader)
    optimizer = tuners[0].optimizer
    kinds = {n: optimizer.state[p]["state1"].dtype for n, p in tuners[0].model.named_parameters()}
    # Embeddings stay as they are, as bitsandbytes' authors advise, and so does what is too small to matter.
    assert {kind for name, kind in kinds.items() if "mlp" in name} == {torch.uint8}
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert losses(tuners[0])[-1] < losses(tuners[0])[0]


def test_noise_on_the_embeddings_while_it_learns_and_not_when_it_is_evaluated(base, data, tmp_path, tuners):
    still = {"learning_rate": 1e-12, "steps": 1, "eval_share": 0.2, "eval_every": 1}
    finetune(small_tuning(base, data, **still), tmp_path / "a", AutoLoader)
    finetune(small_tuning(base, data, neftune=50.0, **still), tmp_path / "b", AutoLoader)
    assert losses(tuners[0])[0] != pytest.approx(losses(tuners[1])[0], rel=1e-6)
    assert losses(tuners[0], "eval_loss") == pytest.approx(losses(tuners[1], "eval_loss"), rel=1e-6)


def test_questions_in_between_change_nothing(base, data, tmp_path, capsys):
    plain = finetune(small_tuning(base, data, dropout=0.1), tmp_path / "a", AutoLoader)
    capsys.readouterr()
    asked = finetune(small_tuning(base, data, dropout=0.1, ask=("红",), ask_every=4), tmp_path / "b", AutoLoader)
    told = capsys.readouterr().err
    assert [told.count(f"[step {step}]") for step in (1, 4, 6)] == [0, 1, 0] and "] 红 -> " in told
    assert weights(plain) == weights(asked)


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_tensorboard_if_asked(base, data, tmp_path):
    finetune(small_tuning(base, data, steps=1), tmp_path / "a", AutoLoader)
    finetune(small_tuning(base, data, steps=1, tensorboard=True), tmp_path / "b", AutoLoader)
    assert not (tmp_path / "a" / "logs").exists() and list((tmp_path / "b" / "logs").rglob("*tfevents*"))


# --- runs that end early ---------------------------------------------------------------------------------------------


def test_an_early_stop_gives_the_best_checkpoint_and_stays_stopped(base, tmp_path, tuners):
    """What is held out is answered otherwise, so its loss rises while that of the rest falls."""
    data, other = some_conversations(tmp_path / "a.jsonl"), some_conversations(tmp_path / "b.jsonl", seed=5)
    lines = [json.loads(line) for line in other.read_text().splitlines()]
    for sample in lines:
        sample["conversations"][1]["value"] = "never seen anywhere"
    other.write_text("".join(json.dumps(sample) + "\n" for sample in lines))
    changes = {"eval_data": str(other), "eval_every": 2, "patience": 2, "steps": 40, "learning_rate": 3e-2}
    recipe = small_tuning(base, data, method="lora", targets=("all-linear",), **changes)
    target = finetune(recipe, tmp_path / "run", AutoLoader)
    state, held_out = tuners[0].state, losses(tuners[0], "eval_loss")
    best = held_out.index(min(held_out))
    assert state.global_step == 2 * len(held_out) < 40 and len(held_out) == best + 1 + 2
    best_one = tmp_path / "run" / f"checkpoint-{2 * (best + 1)}"
    assert load_all(target).keys() == load_all(best_one).keys()
    assert all(torch.equal(tensor, load_all(best_one)[name]) for name, tensor in load_all(target).items())
    before = weights(target)
    for file in target.iterdir():
        file.unlink()
    target.rmdir()  # as if killed before the adapter was written
    assert weights(finetune(recipe, tmp_path / "run", AutoLoader)) == before
    assert len(checkpoints(tmp_path / "run")) == len(held_out)


def load_all(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_stops_the_run_before_the_weights_take_it_in(base, data, tmp_path, monkeypatch, what):
    plain = Tuner.compute_loss

    def spoiled(self, model, *arguments, **options):
        loss = plain(self, model, *arguments, **options)
        if self.state.global_step < 3:
            return loss
        if what == "loss":
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)  # finite, and its derivative is not
        return loss

    monkeypatch.setattr(Tuner, "compute_loss", spoiled)
    with pytest.raises(
        TrainError, match=rf"the {what} is (nan|inf) at step 4\. The last good checkpoint is .*point-2\."
    ):
        finetune(small_tuning(base, data), tmp_path, AutoLoader)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"] and not (tmp_path / "adapter").exists()
    assert all(tensor.isfinite().all() for tensor in load_all(tmp_path / "checkpoint-2").values())


def test_a_full_disk_keeps_the_last_good_checkpoint(base, data, tmp_path, monkeypatch):
    plain = Tuner._save

    def full(self, *arguments, **options):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, *arguments, **options)

    monkeypatch.setattr(Tuner, "_save", full)
    with pytest.raises(TrainError, match=r"the disk is full, .*checkpoint-4 could not .* last good .*checkpoint-2"):
        finetune(small_tuning(base, data), tmp_path, AutoLoader)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"] and not list(
        tmp_path.glob(UNFINISHED + "*")
    )
    monkeypatch.setattr(Tuner, "_save", plain)  # somebody made room
    again = finetune(small_tuning(base, data), tmp_path, AutoLoader)
    assert weights(again) == weights(finetune(small_tuning(base, data), tmp_path.with_name("whole"), AutoLoader))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(base, data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(TrainError, match=r"the disk is full.*last good checkpoint is .*checkpoint-\d"):
            finetune(small_tuning(base, data, method="full"), disk / "run", AutoLoader)
        assert load_file(checkpoints(disk / "run")[-1] / "model.safetensors")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_belongs_to_one_recipe_and_its_data(base, data, tmp_path):
    mine = some_conversations(tmp_path / "mine.jsonl", count=8)
    target = finetune(small_tuning(base, mine, steps=1), tmp_path / "run", AutoLoader)
    written = (target / "adapter_config.json").stat().st_mtime_ns
    finetune(small_tuning(base, mine, steps=1), tmp_path / "run", AutoLoader)
    assert (target / "adapter_config.json").stat().st_mtime_ns == written
    with pytest.raises(TrainError, match="holds a run with r=8, not 4"):
        finetune(small_tuning(base, mine, steps=1, r=4), tmp_path / "run", AutoLoader)
    some_conversations(mine, count=9)
    with pytest.raises(TrainError, match="holds a run with data="):
        finetune(small_tuning(base, mine, steps=1), tmp_path / "run", AutoLoader)


# --- recipes and commands --------------------------------------------------------------------------------------------

OURS = [path.stem for path in FOLDER.glob("*.yaml") if re.match(r"(7b|34b|smollm2|nano)-(full|lora|qlora)$", path.stem)]


@pytest.mark.parametrize("name", OURS)
def test_shipped_recipes_are_good_and_explain_each_line(name):
    load_recipe(Tuning, name)
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert len(OURS) == 12 and all("#" in line for line in lines), lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("method: qlora\nsharding: zero3", "line 3: sharding: zero3 splits weights"),
        ("precision: float16", "line 2: precision: float16 needs a GPU"),
        ("optimizer: adamw-paged-8bit", "line 2: optimizer: .* there is no GPU"),
        ("method: full\ndora: true", "line 3: dora: method full trains all weights"),
        ("lora_plus: 16\nmethod: full", "line 2: lora_plus: method full"),
        ("lora_plus: 0.5", "line 2: lora_plus: a ratio of 1 or above"),
        ("targets: []", "line 2: targets: method lora needs linear maps"),
        ("patience: 3", "line 2: patience: nothing is held out"),
        ("eval_share: 0.1\neval_data: b.jsonl", "line 2: eval_share: eval_data is given too"),
        ("eval_share: 1.0", "line 2: eval_share: must be 0 or above and below 1"),
        ("method: lorra", "line 2: method: 'lorra' is not one of full, lora, qlora"),
        ("batch_size: 0", "line 2: batch_size: must be above 0, not 0"),
        ("learning_rate: fast", "line 2: learning_rate must be of type float, not 'fast'"),
        ("packing: 1", "line 2: packing must be of type bool, not 1"),
        ("rank: 8", "line 2: there is no field 'rank'; known: .*alpha"),
        ("ask: [x]\nsharding: fsdp2", "line 2: ask: no process has all weights"),
        ("sharding: fsdp2\noptimizer: adamw-8bit", "line 3: optimizer: adamw-8bit is bitsandbytes'"),
    ],
)
def test_a_bad_recipe_says_what_and_where(tmp_path, content, message):
    if re.search("float16|paged", content) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: a.jsonl\n{content}\n")
    with pytest.raises(TrainError, match=rf"mine\.yaml, {message}"):
        load_recipe(Tuning, file)


def test_a_number_as_people_write_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: a.jsonl\nlearning_rate: 1e-4\n")
    assert load_recipe(Tuning, file).learning_rate == 1e-4


def test_bad_data_and_targets(base, data, tmp_path):
    with pytest.raises(TrainError, match="data: there is no file nowhere"):
        finetune(small_tuning(base, "nowhere"), tmp_path, AutoLoader)
    with pytest.raises(TrainError, match="no conversation is left to learn from"):
        finetune(small_tuning(base, data, length=2), tmp_path, AutoLoader)
    with pytest.raises(TrainError, match=r"no linear map 'W_pack'; it has down_proj, .*, all-linear"):
        finetune(small_tuning(base, data, targets=("W_pack",)), tmp_path / "new", AutoLoader)


def test_the_command_and_merge(base, data, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({**PLAIN, "base": str(base)}))
    argv = ["finetune", "--recipe", str(recipe), "--data", str(data), "--out", str(tmp_path / "run")]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*argv, "--dry-run", "--lang", "zh"]) == 0
    told = capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before and "试运行结束" in told.out and "训练：6 步，每步 4 行" in told.out
    assert cli.main([*argv, "--set", "steps=2", "learning_rate=1e-3"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "adapter")
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(base), str(tmp_path / "run" / "adapter"), "--out", str(merged)]) == 0
    wrapped = PeftModel.from_pretrained(Aquila2ForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter")
    plain = Aquila2ForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(plain), logits(wrapped), rtol=1e-5, atol=1e-5)
    assert cli.main([*argv, "--set", "steps"]) == cli.FAILED and "key=value is needed" in capsys.readouterr().err
    assert cli.main([*argv, "--set", "dora=maybe"]) == cli.FAILED
    assert "dora=maybe: dora must be of type bool" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_the_dry_run_counts_what_is_there(base, data, method):
    recipe = small_tuning(base, data, method=method)
    loader = open_base(recipe, AutoLoader)
    config, model = loader.config, loader.get_model()
    held = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    if method == "qlora":  # the scales are no parameters
        held += sum(t.nbytes for m in model.modules() if hasattr(m, "weight") for t in scales(m.weight))
    learned = tunable(recipe, model, "tiny").parameters()
    count = sum(p.numel() for p in learned if p.requires_grad)
    need = tuning_memory(recipe, config, count)
    assert trainable_parameters(recipe, config, "tiny") == count
    assert need.weights == pytest.approx(held, rel=0.02 if method != "qlora" else 0.6)
    assert need.trained == count * (12 if method == "full" else 16)


def scales(weight):
    state = getattr(weight, "quant_state", None)
    return [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]


# --- several processes ------------------------------------------------------------------------------------------------


def launch(script, folder, recipe, *more, **variables):
    settings = {
        "CKPT_OUTPUT": str(folder),
        "EXPNAME": "x",
        "RECIPE": str(recipe),
        "PYTHON": sys.executable,
        **variables,
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
    command = ["bash", str(ROOT / "finetune" / script), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_give_the_weights_of_one(base, data, tmp_path, method):
    fields = {**PLAIN, "base": str(base), "method": method, "learning_rate": 1e-3, "clip": 0.5}
    recipe, hosts = tmp_path / "mine.yaml", tmp_path / "hosts"
    recipe.write_text(yaml.safe_dump(fields))
    hosts.write_text("127.0.0.1 slots=2\n")
    one = launch("7B/finetune.sh", tmp_path / "one", recipe, DATA_FILE=str(data), NPROC="1")
    two = launch(
        "7B/finetune.sh",
        tmp_path / "two",
        recipe,
        *("--set", "batch_size=2"),
        DATA_FILE=str(data),
        HOSTFILE=str(hosts),
        SHARDING="",
        MASTER_PORT=free_port(),
    )
    folders = [Path(told.strip()) for told in (one, two)]
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(folder / file) for folder in folders)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    dice = sorted(path.name for path in (tmp_path / "two").rglob("checkpoint-6/rng*"))
    assert dice == ["rng_state_0.pth", "rng_state_1.pth"]
