"""Fine-tuning SmolLM2-135M on a CPU: this package against transformers' Trainer with peft, in one run, turn by turn.

Both sides begin with the same weights, take the same optimizer and learn from the same conversations. The peer is what
people write: LlamaForCausalLM, `DataCollatorForSeq2Seq`, four conversations a step in random order, padded to the
longest of them. Ours is the recipe `smollm2-lora` or `smollm2-full`: rows of 512 tokens into which as many whole
conversations are packed as fit, one row a step, which is about four conversations too; so the weights move as often.

Each side has a process of its own and they take turns, round by round. A round of the first table is a set of
conversations once through Trainer; one of the second, some steps of 4 x 128 tokens that all have a label. What is
printed are medians, of the ratios too, and CPU seconds beside them, which hardly depend on who else computes. Memory is
resident memory at its highest, as the kernel counts it, and the same less what the process held when the model was
loaded; in the first table the peer's longest batch decides it, in the second both sides compute the same tokens. Before
all that both sides' losses and gradients are compared.

    python benchmarks/finetune.py [--quick] [--methods lora full] [--rounds 5] [--threads 2] [--save]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from importlib import metadata
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "aquila2_tut" / "train" / "speed.json"
PEER, OURS = SIDES = ("transformers", "ours")
MODEL, SEED, AT_ONCE = "SmolLM2-135M", 42, 4
MADE = ("babi15", "babi16", "kinship", "arithmetic")
STEPS, ROWS, WIDTH = 3, 4, 128  # of a round of the second table
GRADIENTS_OF = 16  # conversations


# --- what is learned ---


def conversations(count: int = 200) -> list[dict[str, Any]]:
    """The book's samples about its own model, and questions of its tasks: one to six of them a conversation."""
    from aquila2_tut.assets import shipped
    from aquila2_tut.data import generate, read_conversations

    dice = Random(SEED)
    made = list(read_conversations(shipped("samples") / "about_nano.jsonl"))
    wells = {(task, lang): generate(task, lang, "train", SEED) for task in MADE for lang in ("en", "zh")}
    while len(made) < 200:
        language, turns = dice.choice(("en", "en", "zh")), []
        for _ in range(min(6, int(dice.paretovariate(2.5)))):
            instance = next(wells[dice.choice(MADE), language])
            turns += instance.conversation(cot=dice.random() < 0.5)["conversations"]
        made.append({"id": f"made-{len(made)}", "conversations": turns})
    dice.shuffle(made)
    return made[:count]


def written(made: list[dict[str, Any]], rounds: int, folder: Path) -> list[Path]:
    """One file a round, and one of all conversations at the end."""
    parts = [made[n::rounds] for n in range(rounds)]
    files = [folder / f"{n}.jsonl" for n in range(rounds)] + [folder / "all.jsonl"]
    for file, part in zip(files, [*parts, made], strict=True):
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in part)
        file.write_text(text, encoding="utf-8")
    return files


# --- one side, in a process of its own ---


@dataclass
class Side:
    """What a process keeps from round to round."""

    name: str
    recipe: Any
    model: Any
    tokenizer: Any
    template: Any
    loaded: int  # bytes
    folder: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="finetune-"))


HERE: Side | None = None


def begin(name: str, method: str, threads: int) -> None:
    """Loads the model."""
    global HERE
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    import torch
    import transformers

    from aquila2_tut import AutoLoader
    from aquila2_tut.train import Tuning
    from aquila2_tut.train.finetuning import choose_template, open_base, tunable
    from aquila2_tut.train.recipe import load_recipe

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    changes = {
        "batch_size": 1,
        "steps": 0,
        "save_every": 10**6,
        "dropout": 0.0,
        "eval_share": 0.0,
        "eval_data": "",
        "eval_every": 0,
    }
    recipe = replace(load_recipe(Tuning, f"smollm2-{method}"), **changes, ask=(), log_every=1)
    loader = open_base(recipe, lambda *a, **o: AutoLoader(*a, **o, local_files_only=True))
    model = loader.get_model()
    model = tunable(recipe, model, MODEL) if name == OURS else as_peers_do(model, recipe)
    HERE = Side(name, recipe, model, loader.get_tokenizer(), choose_template(recipe, MODEL), 0)
    gc.collect()
    HERE.loaded = memory("VmRSS")


def as_peers_do(ours: Any, recipe: Any) -> Any:
    """A LlamaForCausalLM with the same weights, and peft's adapters, which begin alike."""
    import torch
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
              "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    with init_empty_weights():
        llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(ours.config, name) for name in shared}))
    llama.load_state_dict(ours.state_dict(), assign=True)
    llama.tie_weights()
    for parameter in llama.parameters():
        parameter.requires_grad_(recipe.method == "full")
    if recipe.method == "full":
        return llama.train()
    torch.manual_seed(recipe.seed)
    options = {"r": recipe.r, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
    return get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)).train()


def memory(what: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at the highest since `reset`."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def reset() -> None:
    """Lets the highest begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def samples(file: Path) -> list[Any]:
    """The conversations of a file, encoded and not packed."""
    from aquila2_tut.train.tuning_data import tuning_data

    return tuning_data(replace(HERE.recipe, data=str(file), packing=False), HERE.tokenizer, HERE.template).train


def labelled(rows: list[Any]) -> int:
    return sum(int((row.labels[1:] != -100).sum()) for row in rows)


def as_dicts(rows: list[Any]) -> list[dict[str, list[int]]]:
    """What the peer's collator takes."""
    return [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows]


def padding_collator() -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(HERE.tokenizer, padding=True, label_pad_token_id=-100)


def trainer(rows: list[Any], at_once: int, callbacks: list[Any]) -> Any:
    """A Trainer for one round; the weights are those that the last one has left."""
    from transformers import Trainer

    from aquila2_tut.train.finetuning import WORDS
    from aquila2_tut.train.tuner import Tuner
    from aquila2_tut.train.tuning import tuning_arguments
    from aquila2_tut.train.tuning_data import TuningData

    recipe = replace(HERE.recipe, batch_size=at_once)
    if HERE.name == OURS:
        data = TuningData(rows, [], (len(rows), 0), 0, 0, 0, 0, "")
        made = Tuner(HERE.model, recipe, data, HERE.tokenizer, HERE.template, Path(HERE.folder), WORDS["en"])
    else:
        arguments = tuning_arguments(recipe, Path(HERE.folder))
        made = Trainer(HERE.model, arguments, train_dataset=as_dicts(rows), data_collator=padding_collator())
    made.args.save_strategy = "no"
    for callback in callbacks:
        made.add_callback(callback)
    return made


def trained(rows: list[Any], at_once: int) -> dict[str, Any]:
    """One run of Trainer: seconds and CPU seconds of the whole and of each step, the highest memory, the losses."""
    from transformers import TrainerCallback

    clocks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clocks.append((time.perf_counter(), cpu_seconds()))

    run = trainer(rows, at_once, [Clock()])
    gc.collect()
    reset()
    start, used = time.perf_counter(), cpu_seconds()
    run.train()
    end = {"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - used, "peak": memory("VmHWM")}
    steps = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(clocks)]
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    HERE.model.zero_grad(set_to_none=True)
    return end | {"steps": steps, "losses": losses}


def cpu_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def epoch(file: Path) -> dict[str, Any]:
    """A round of the first table."""
    from aquila2_tut.train.tuning_data import tuning_data

    rows = samples(file)
    found = {"samples": len(rows), "tokens": sum(len(row.input_ids) for row in rows), "labelled": labelled(rows)}
    if HERE.name == OURS:
        rows = tuning_data(replace(HERE.recipe, data=str(file)), HERE.tokenizer, HERE.template).train
    return found | trained(rows, 1 if HERE.name == OURS else AT_ONCE) | {"loaded": HERE.loaded}


def batches(file: Path, number: int) -> dict[str, Any]:
    """A round of the second table: every token has a label, every row is full."""
    import numpy as np

    from aquila2_tut.data import Row

    ids = np.concatenate([row.input_ids for row in samples(file)])
    begin = number * STEPS * ROWS * WIDTH % (len(ids) - STEPS * ROWS * WIDTH)
    table = ids[begin:][: STEPS * ROWS * WIDTH].reshape(-1, WIDTH)
    labels = np.where(np.arange(WIDTH), table, -100)
    rows = [Row(a, b, np.ones_like(a)) for a, b in zip(table, labels, strict=True)]
    return trained(rows, ROWS) | {"loaded": HERE.loaded}


def loss_and_gradients(everything: Path, some: Path, out: Path) -> dict[str, float]:
    """The mean loss over all labelled tokens of a file; and the gradients of some of another, written to `out`."""
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        mean = sum(float(loss) for loss in losses(samples(everything)))
    for loss in losses(samples(some)[:GRADIENTS_OF]):
        loss.backward()
    found = {"loss": mean, "labelled": labelled(samples(everything))}
    gradients = {name: p.grad.contiguous() for name, p in HERE.model.named_parameters() if p.grad is not None}
    save_file(gradients, out)
    return found


def losses(rows: list[Any]) -> Any:
    """Each batch's share of the mean loss, each side with batches of its own."""
    from aquila2_tut.data import collate, pack_best_fit
    from aquila2_tut.train import causal_loss

    count = labelled(rows)
    if HERE.name == OURS:
        for row in pack_best_fit(as_dicts(rows), HERE.recipe.length):
            yield causal_loss(HERE.model, collate([row], 0), count)
        return
    join, items = padding_collator(), as_dicts(rows)
    for at in range(0, len(items), AT_ONCE):
        yield HERE.model(**join(items[at : at + AT_ONCE]), num_items_in_batch=count, use_cache=False).loss


# --- all rounds ---


def apart(files: list[Path]) -> float:
    """How far apart two sets of gradients are: the length of the difference, by that of the first."""
    from safetensors import safe_open

    stored = [safe_open(file, "pt") for file in files]
    assert set(stored[0].keys()) == set(stored[1].keys()), "the two sides do not train the same parameters"
    pairs = [[file.get_tensor(name).double() for file in stored] for name in stored[0].keys()]  # noqa: SIM118
    return float(sum((a - b).square().sum() for a, b in pairs) ** 0.5 / sum(a.square().sum() for a, _ in pairs) ** 0.5)


@contextmanager
def processes(method: str, threads: int) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A fresh process for each side: memory that other work has left behind would count as its own."""
    context = get_context("spawn")
    sides = {side: ProcessPoolExecutor(1, context, begin, (side, method, threads)) for side in SIDES}
    try:
        for future in [process.submit(memory, "VmRSS") for process in sides.values()]:
            future.result()  # both load at the same time
        yield sides
    finally:
        for process in sides.values():
            process.shutdown()


def alternated(method: str, threads: int, task: Any, rounds: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """What a task finds, side by side and turn by turn."""
    found: dict[str, list[Any]] = {side: [] for side in SIDES}
    with processes(method, threads) as sides:
        for given in rounds:
            for side, process in sides.items():
                found[side].append(result := process.submit(task, *given).result())
                told = f"{result['seconds']:.1f} s, {result['cpu']:.1f} s of CPU, {result['peak'] / 1e6:.0f} MB"
                print(f"{method}, {task.__name__}, {side}: {told}", file=sys.stderr, flush=True)
    return found


def compare(method: str, files: list[Path], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one method."""
    *parts, everything = files
    found: dict[str, Any] = {}
    out = {side: folder / f"{method}-{side}.safetensors" for side in SIDES}
    scored = everything if method == options.methods[-1] else parts[0]  # an adapter begins as nothing: once is enough
    with processes(method, options.threads) as sides:
        for side, process in sides.items():
            found[side] = process.submit(loss_and_gradients, scored, parts[0], out[side]).result()
    found["gradients_apart"] = apart(list(out.values()))
    found["batch"] = alternated(method, options.threads, batches, [(everything, n) for n in range(options.rounds)])
    return found | {"epoch": alternated(method, options.threads, epoch, [(part,) for part in parts])}


# --- what is printed and kept ---


def median(runs: list[dict[str, Any]], value: Any) -> float:
    return statistics.median(value(run) for run in runs)


def rate(run: dict[str, Any]) -> float:
    return run["samples"] / run["seconds"]


def seconds_a_step(run: dict[str, Any]) -> float:
    return statistics.median(seconds for seconds, _ in run["steps"])


def cpu_a_step(run: dict[str, Any]) -> float:
    return statistics.median(seconds for _, seconds in run["steps"])


def ratio(found: dict[str, list[dict[str, Any]]], value: Any) -> float:
    """The median over the rounds of ours by the peer's."""
    return statistics.median(value(ours) / value(peer) for ours, peer in zip(found[OURS], found[PEER], strict=True))


def row_of(found: list[dict[str, Any]]) -> dict[str, float]:
    peak = max(run["peak"] for run in found)
    return {"peak_bytes": peak, "peak_above_model_bytes": peak - found[0]["loaded"]}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a method."""
    epoch, batch = found["epoch"], found["batch"]
    whole = {
        side: {
            "samples_per_second": sum(run["samples"] for run in runs) / sum(run["seconds"] for run in runs),
            "cpu_seconds": sum(run["cpu"] for run in runs),
            **row_of(runs),
        }
        for side, runs in epoch.items()
    }
    steps = {
        side: {
            "seconds_per_step": median(runs, seconds_a_step),
            "cpu_seconds_per_step": median(runs, cpu_a_step),
            "losses": [loss for run in runs for loss in run["losses"]],
            **row_of(runs),
        }
        for side, runs in batch.items()
    }
    curves = zip(*(steps[side]["losses"] for side in SIDES), strict=True)
    return {
        "conversations": whole | {"speed_ratio": ratio(epoch, rate), "cpu_ratio": ratio(epoch, lambda run: run["cpu"])},
        "batch": steps | {"speed_ratio": 1 / ratio(batch, seconds_a_step), "cpu_ratio": ratio(batch, cpu_a_step)},
        "losses_apart": max(abs(a - b) for a, b in curves),
        "at_first": {"labelled": found[OURS]["labelled"], "loss": {side: found[side]["loss"] for side in SIDES}},
        "gradients_apart": found["gradients_apart"],
    }


def report(method: str, found: dict[str, Any]) -> None:
    """Prints both tables of a method."""
    for what, speed, cpu, head in (
        ("conversations", "samples_per_second", "cpu_seconds", "samples/s"),
        ("batch", "seconds_per_step", "cpu_seconds_per_step", "s/step"),
    ):
        part = found[what]
        print(f"{method + ', ' + what:24}{head:>10}{'CPU s':>9}{'peak MB':>9}{'- model':>9}")
        for side in SIDES:
            r = part[side]
            memory = f"{r['peak_bytes'] / 1e6:9.0f}{r['peak_above_model_bytes'] / 1e6:9.0f}"
            print(f"  {side:22}{r[speed]:10.2f}{r[cpu]:9.1f}{memory}")
        shares = [part[OURS][name] / part[PEER][name] for name in ("peak_bytes", "peak_above_model_bytes")]
        print(f"  {'ours by theirs':22}{part['speed_ratio']:9.2f}x{part['cpu_ratio']:9.2f}", end="")
        print("".join(f"{share:9.2f}" for share in shares))
    theirs, ours = (found["at_first"]["loss"][side] for side in SIDES)
    print(
        f"  loss of {found['at_first']['labelled']} labels before the first step: {theirs:.6f} and {ours:.6f}, packed; "
        f"gradients {found['gradients_apart']:.1e} of their length apart;\n"
        f"  losses of the full batches, step by step: at most {found['losses_apart']:.1e} apart",
        flush=True,
    )


def described(runs: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, int]:
    """What the conversations are."""
    total = {name: sum(run[name] for run in runs) for name in ("samples", "tokens", "labelled")}
    return total | {"steps_ours": sum(len(run["losses"]) for run in runs), "steps": sum(len(r["losses"]) for r in peer)}


def save(results: dict[str, Any], data: dict[str, int], options: argparse.Namespace, load: float) -> None:
    """Writes the file that the chapter reads; `load` is that of the machine before the first round."""
    packages = ("torch", "transformers", "peft", "accelerate")
    conditions = {
        "date": date.today().isoformat(),
        "threads": options.threads,
        "rounds": options.rounds,
        "load": round(load, 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
    facts = {"about": " ".join(__doc__.split("\n\n")[0].split()), "conditions": conditions, "data": data}
    text = json.dumps(facts | {"methods": rounded(results)}, indent=1)
    RESULT.write_text(text + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Five digits of every number with a fraction."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Alternates the sides and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 conversations in two rounds")
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.save and (options.quick or len(options.methods) < 2):
        parser.error("--save writes what one whole run found: leave --quick and --methods out")
    options.rounds = 2 if options.quick else options.rounds
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    load, results = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as folder:
        files = written(conversations(16) if options.quick else conversations(), options.rounds, Path(folder))
        print(f"{MODEL}, float32, {options.threads} threads, {options.rounds} rounds, alternating; load {load:.1f}")
        for method in options.methods:
            found = compare(method, files, options, Path(folder))
            data = described(*(found["epoch"][side] for side in (OURS, PEER)))
            if not results:
                print(
                    "{samples} conversations in English and Chinese, {tokens} tokens, {labelled} with a label; "
                    "{steps} steps, ours {steps_ours}".format(**data)
                )
            results[method] = summary(found)
            report(method, results[method])
    if options.save:
        save(results, data, options, load)


if __name__ == "__main__":
    main()
