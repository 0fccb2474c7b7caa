"""Our models in lm-eval against lm-eval's own `hf` class: the same requests, one thread, in turn, in one run.

SmolLM2-135M in float32, here as an Aquila2 model in `HarnessModel`, there as transformers' LlamaForCausalLM in `HFLM`,
with the same batch size. For each set: how far log-likelihoods lie apart, whether every generation is the same, both
times, and their ratio. Of a text the distance is told for each token too: over hundreds of them the softmax and the sum
that hf takes in float32 lose the third decimal. HumanEval's programs, 164 in all, are run in the sandbox if allowed.

    python benchmarks/evaluate.py [--humaneval 24] [--batch-size 8] [--allow-code-execution] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from aquila2_tut import AutoLoader, assets
from aquila2_tut.evaluate.harness import HarnessModel
from aquila2_tut.evaluate.runs import loaded
from aquila2_tut.evaluate.suites import Setting, suites
from aquila2_tut.evaluate.tasks import lm_eval_task, load_items

SETS = ("mmlu-en", "winogrande-en", "gsm8k-en")


def load(batch_size: int) -> dict[str, object]:
    """Both sides, with one tokenizer: transformers' own reading of the file's splits numbers otherwise."""
    file = assets.path("smollm2-135m")
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    loader = AutoLoader(
        "aquila2", model_name="SmolLM2-135M", device="cpu", torch_dtype="float32", local_files_only=True
    )
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    return {
        "hf": HFLM(pretrained=theirs, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, device="cpu"),
        "ours": HarnessModel(model, tokenizer, batch_size, progress=False),
    }


def requests_of(configurations: Sequence[dict], limit: int | None = None) -> list[Instance]:
    """What lm-eval asks for some tasks."""
    tasks = loaded(configurations)["tasks"].values()
    for task in tasks:
        task.build_all_requests(limit=limit)
    return [request for task in tasks for request in task.instances]


def perplexity_requests() -> list[Instance]:
    """Texts of many lengths: GSM8K's questions and answers, and what follows them in the file."""
    items = load_items("gsm8k-en") + load_items("gsm8k-shipped-en")
    texts = ["\n\n".join(f"{one['question']}\n{one['answer']}" for one in items[i : i + 1 + i % 5]) for i in range(20)]
    return [Instance("loglikelihood_rolling", {}, (text,), i, metadata=("ppl", i, 1)) for i, text in enumerate(texts)]


def both(models: dict[str, object], requests: list[Instance]) -> dict[str, tuple[list, float]]:
    """Answers and seconds of each side."""
    found = {}
    for side, model in models.items():
        # hf adds to the stop texts that it is given.
        given = copy.deepcopy(requests)
        start = time.perf_counter()
        answers = getattr(model, requests[0].request_type)(given)
        found[side] = answers, time.perf_counter() - start
    return found


def compare(name: str, found: dict[str, tuple[list, float]], tokens: list[int]) -> dict[str, object]:
    """One row of the table."""
    (theirs, their_seconds), (ours, our_seconds) = found["hf"], found["ours"]
    row = {"set": name, "requests": len(ours), "hf_seconds": their_seconds, "our_seconds": our_seconds}
    row["ratio"] = our_seconds / their_seconds
    if isinstance(ours[0], str):
        return row | {"same": sum(one == other for one, other in zip(ours, theirs, strict=True))}
    pairs = [one if isinstance(one, tuple) else (one, None) for one in ours]
    others = [one if isinstance(one, tuple) else (one, None) for one in theirs]
    apart = [abs(one[0] - other[0]) for one, other in zip(pairs, others, strict=True)]
    row |= {"apart": max(apart), "same": sum(one[1] == other[1] for one, other in zip(pairs, others, strict=True))}
    if pairs[0][1] is None:
        row["apart_per_token"] = max(gap / count for gap, count in zip(apart, tokens, strict=True))
        row["perplexity"] = [math.exp(-sum(one[0] for one in side) / sum(tokens)) for side in (others, pairs)]
    return row


def rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    models = load(options.batch_size)
    ours = models["ours"]
    setting = Setting(ours.tokenizer, ours.max_length)
    for suite in suites(SETS, setting):
        yield compare(suite.name, both(models, requests_of(suite.tasks)), [])
    requests = perplexity_requests()
    yield compare("perplexity", both(models, requests), [len(ours.tok_encode(one.args[0])) for one in requests])
    task = lm_eval_task("humaneval-en") | {"num_fewshot": 0}
    requests = requests_of([task], options.humaneval)
    found = both(models, requests)
    row = compare("humaneval-en", found, [])
    if options.allow_code_execution:
        pairs = {side: zip(requests, answers, strict=True) for side, (answers, _) in found.items()}
        score = task["process_results"]
        row |= {
            f"{side}_passed": sum(score(request.doc, [text])["pass@1"] for request, text in own)
            for side, own in pairs.items()
        }
    yield row


def shown(row: dict[str, object]) -> str:
    told = f"{row['set']:18}{row['requests']:6}{row['same']:6} same  "
    told += f"hf {row['hf_seconds']:8.2f} s  ours {row['our_seconds']:8.2f} s  ratio {row['ratio']:.2f}"
    rest = {key: value for key, value in row.items() if key.startswith(("apart", "perplexity", "hf_p", "ours_p"))}
    return told + "".join(f"  {key} {value}" for key, value in rest.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval", type=int, default=24, help="problems, of 164")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--allow-code-execution", action="store_true", help="run HumanEval's programs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = []
    for row in rows(options):
        found.append(row)
        print(shown(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    ours, theirs = (sum(row[f"{side}_seconds"] for row in found) for side in ("our", "hf"))
    print(f"all together: hf {theirs:.1f} s, ours {ours:.1f} s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
