"""Megabytes of text a second: our byte-pair encoding in Python, the production path, `tokenizers`, `sentencepiece`.

All encode the same lines of English (Python's manual) and of Chinese (JupyterLab's messages and dialogues), in one
process, in a new order each round. The speed is that of the best round; the ratio is the median of the ratios within
each round, which a busy machine disturbs least. All but the last have Aquila's vocabulary and give the same ids, which
is checked; `sentencepiece` runs Mistral's model, another vocabulary of its own kind. "cold" starts with an empty cache,
so every word is merged once; "warm" has seen the text before.

    python benchmarks/tokenizer.py [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

Sides = dict[str, Callable[[list[str]], list[list[int]]]]


def texts() -> dict[str, list[str]]:
    """Lines to encode, by language."""
    from aquila2_tut.data import dialogues, parallel_sentences

    english = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines(keepends=True)]
    chinese = [chinese for _, chinese in parallel_sentences()]
    chinese += [turn for turns in dialogues("zh") for turn in turns]
    return {"English": english, "Chinese": chinese}


def sides() -> Sides:
    """Name -> a function that encodes a list of lines."""
    import sentencepiece

    from aquila2_tut import assets
    from aquila2_tut.tokenizer import BytePairEncoding, encode_batch, load_tokenizer

    production = load_tokenizer("Aquila2-7B")
    ours, backend = BytePairEncoding.from_tokenizer(production), production.backend_tokenizer
    mistral = sentencepiece.SentencePieceProcessor(model_file=str(assets.path("mistral-tokenizer")))

    def cold(lines: list[str]) -> list[list[int]]:
        ours._known.clear()
        return [ours.encode(line) for line in lines]

    return {
        "ours, cold cache": cold,
        "ours, warm cache": lambda lines: [ours.encode(line) for line in lines],
        "production (encode_batch)": lambda lines: encode_batch(production, lines),
        "tokenizers, encode_batch_fast": lambda lines: [found.ids for found in backend.encode_batch_fast(lines)],
        "tokenizers, encode_batch": lambda lines: [found.ids for found in backend.encode_batch(lines)],
        "transformers, call": lambda lines: production(lines).input_ids,
        "sentencepiece (Mistral's model)": lambda lines: mistral.encode(lines),
    }


def seconds(encode: Callable[[list[str]], Any], lines: list[str]) -> float:
    """Wall time of encoding the lines once."""
    start = time.perf_counter()
    encode(lines)
    return time.perf_counter() - start


def check(every: Sides, lines: list[str]) -> None:
    """All but the last give the same ids."""
    first, *others = [encode(lines) for encode in list(every.values())[:-1]]
    if any(other != first for other in others):
        raise SystemExit("the sides do not give the same ids; there is nothing to compare")


def report(language: str, size: int, taken: dict[str, list[float]]) -> None:
    """One row a side, with its ratio to the raw Rust library."""
    raw = taken["tokenizers, encode_batch_fast"]
    print(f"\n{language}, {size / 1e6:.2f} MB\n{'':34}{'MB/s':>8}{'x tokenizers':>14}")
    for side, times in taken.items():
        ratio = statistics.median(peer / own for peer, own in zip(raw, times, strict=True))
        print(f"{side:34}{size / min(times) / 1e6:8.2f}{ratio:14.2f}")


def main() -> None:
    """Alternates the sides and prints one table a language."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the Rust library; the others have one")
    args = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "true"}
    every, order = sides(), random.Random(0)
    print(f"tokenizers with {args.threads} thread(s); {args.rounds} rounds")
    for language, lines in texts().items():
        check(every, lines)
        taken = {side: [] for side in every}
        for _ in range(args.rounds):
            for side in order.sample(list(every), len(every)):  # who comes after whom must not matter
                taken[side].append(seconds(every[side], lines))
        size = sum(len(line.encode()) for line in lines)
        report(language, size, taken)


if __name__ == "__main__":
    main()
