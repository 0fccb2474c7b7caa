"""How good are Aquila2-Nano and Aquila2-Nano-Chat? Every figure with its 95 % interval and something to beat.

The base model: bits per byte of the held-out texts, source by source, beside a 5-gram Kneser-Ney model of the same
tokens and a 12-gram one of bytes, both counted on the same training texts. Below 0, a difference means that Nano needs
less; it is taken text by text. SmolLM2-135M-Instruct (4 bits a weight) is slow on a CPU, so it reads a sample of each
source; Nano's figure beside it is of the same texts. It reads 2,048 tokens at once, Nano 512, and before a text stands
the token that each knows from its own training.

The chat model: right answers to held-out instances of the generated tasks, asked plainly and asked to think step by
step, beside the most frequent answer and a guess among the names in the story; and chrF of translations of held-out
sentences, beside the translation of the most similar sentence in the training part.

    python benchmarks/nano.py [--model data/Aquila2-Nano] [--chat data/Aquila2-Nano-Chat] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
PEER_WINDOW, PEER_BEGIN = 2048, "<|endoftext|>"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: documents a source, bytes a source for SmolLM2, questions a task, and with which models."""

    documents: int | None = None
    peer_bytes: int = 40_000
    questions: int = 200
    bytes_model: bool = True


QUICK = Sizes(documents=6, peer_bytes=3000, questions=16, bytes_model=False)


def told(what: str) -> None:
    """Progress, apart from the results."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# --- bits per byte ---


def held_out_texts(limit: int | None) -> dict[str, list[str]]:
    """Texts by source, at most so many, drawn by lot."""
    from aquila2_tut.data import SOURCES, corpus

    found = {source: [document.text for document in corpus("held-out", [source])] for source in SOURCES}
    return {source: Random(0).sample(texts, min(limit or len(texts), len(texts))) for source, texts in found.items()}


def sample_by_bytes(texts: Sequence[str], limit: int) -> list[int]:
    """Indices of texts drawn by lot until they hold so many bytes."""
    order, chosen, size = Random(1).sample(range(len(texts)), len(texts)), [], 0
    for index in order:
        if size >= limit:
            break
        chosen.append(index)
        size += len(texts[index].encode())
    return sorted(chosen)


def count_models(tokenizer: Any, held: dict[str, list[str]], with_bytes: bool) -> dict[str, dict[str, list]]:
    """Model -> source -> Bits of each text, for the models that only count."""
    from aquila2_tut.data import corpus
    from aquila2_tut.evaluate import NGram, byte_sequence
    from aquila2_tut.evaluate.ngram import BYTES
    from aquila2_tut.tokenizer import encode_batch

    training = [document.text for document in corpus("train")]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]

    def by_tokens(texts: Sequence[str], end: bool) -> list[list[int]]:
        return [bos + ids + eos * end for ids in encode_batch(tokenizer, texts)]

    def by_bytes(texts: Sequence[str], end: bool) -> list[list[int]]:
        return [byte_sequence(text, end) for text in texts]

    kinds = {"KN-5": (by_tokens, len(tokenizer), 5)} | ({"bytes-12": (by_bytes, BYTES, 12)} if with_bytes else {})
    found = {}
    for name, (encode, size, order) in kinds.items():
        told(f"counting {len(training):,} texts: {name}")
        model = NGram(encode(training, True), size, order)
        found[name] = {source: with_bytes_of(texts, model.bits(encode(texts, False))) for source, texts in held.items()}
    return found


def with_bytes_of(texts: Sequence[str], bits: Sequence[float]) -> list:
    """Bits of each text."""
    from aquila2_tut.evaluate import Bits

    return [Bits(float(needed), len(text.encode())) for needed, text in zip(bits, texts, strict=True)]


def grouped(held: dict[str, list]) -> Iterator[tuple[str, list[str]]]:
    """Every source by itself, then those of each language together."""
    from aquila2_tut.data import SOURCES

    yield from ((source, [source]) for source in held)
    for language, name in (("en", "English"), ("zh", "Chinese")):
        yield name, [source for source in held if SOURCES[source].language == language]


def compared(found: dict[str, dict[str, list]], first: str = "Nano") -> dict[str, dict[str, Any]]:
    """Source or language -> texts, bytes, each model's figure, and by how much the first needs less or more."""
    from aquila2_tut.evaluate import difference, interval

    table = {}
    for name, sources in grouped(found[first]):
        bits = {model: [item for source in sources for item in by_source[source]] for model, by_source in found.items()}
        own = bits[first]
        table[name] = {"texts": len(own), "bytes": sum(item.bytes for item in own)}
        table[name] |= {model: interval(items) for model, items in bits.items()}
        table[name] |= {f"{first} - {model}": difference(own, bits[model]) for model in bits if model != first}
    return table


def measure_base(folder: Path, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """The table of all held-out texts, and that of the sample."""
    from aquila2_tut import AutoLoader
    from aquila2_tut.evaluate import bits_per_byte

    held = held_out_texts(sizes.documents)
    nano = AutoLoader(model_name=str(folder), device="cpu", local_files_only=True)
    mine: dict[str, list] = {}
    for source, texts in held.items():
        told(f"Nano: {source}")
        mine[source] = bits_per_byte(nano.get_model(), nano.get_tokenizer(), texts)
    counted = count_models(nano.get_tokenizer(), held, sizes.bytes_model)
    chosen = {source: sample_by_bytes(texts, sizes.peer_bytes) for source, texts in held.items()}
    peer = measure_peer({source: [held[source][i] for i in some] for source, some in chosen.items()})
    same = {source: [mine[source][i] for i in some] for source, some in chosen.items()}
    return {"held-out": compared({"Nano": mine, **counted}), "sample": compared({"Nano": same, "SmolLM2": peer})}


def measure_peer(texts: dict[str, list[str]]) -> dict[str, list]:
    """Source -> Bits of each text for SmolLM2."""
    from aquila2_tut import AutoLoader
    from aquila2_tut.evaluate import bits_per_byte

    loader = AutoLoader(model_name="SmolLM2-135M", device="cpu", local_files_only=True)
    tokenizer, found = loader.get_tokenizer(), {}
    begin = tokenizer.convert_tokens_to_ids(PEER_BEGIN)
    for source, some in texts.items():
        told(f"SmolLM2: {len(some)} texts of {source}")
        found[source] = bits_per_byte(loader.get_model(), tokenizer, some, window=PEER_WINDOW, begin=begin)
    return found


# --- the chat model ---


def measure_tasks(answer: Callable[[list[str]], list[str]], count: int) -> dict[str, dict[str, Any]]:
    """Task and language -> accuracy of the model, asked plainly and asked to think, and of the simple answers."""
    from aquila2_tut.data import generate
    from aquila2_tut.data.corpora import LANGUAGES
    from aquila2_tut.evaluate import accuracy, guesses, held_out, majority
    from aquila2_tut.evaluate.generated import REASONING

    table = {}
    for task, language in ((task, language) for task in REASONING for language in LANGUAGES):
        told(f"Nano-Chat: {task}, {language}")
        asked, training = held_out(task, language, count), list(islice(generate(task, language, "train"), 2000))
        table[f"{task} {language}"] = {
            "questions": count,
            "plain": accuracy(asked, answer([one.prompt() for one in asked])),
            "thinking": accuracy(asked, answer([one.prompt(cot=True) for one in asked])),
            "most frequent": accuracy(asked, majority(training, count)),
            "guess": accuracy(asked, guesses(training, asked)),
        }
    return table


def measure_translation(answer: Callable[[list[str]], list[str]], count: int) -> dict[str, dict[str, Any]]:
    """Direction and kind of sentence -> chrF of the model and of the most similar sentence's translation."""
    from aquila2_tut.data import aligned_pairs, parallel_sentences
    from aquila2_tut.evaluate import NearestPair, chrf, translations

    screen, held = set(parallel_sentences()), aligned_pairs("held-out")
    kinds = {"screen": [pair for pair in held if pair in screen], "help": [pair for pair in held if pair not in screen]}
    training, table = aligned_pairs("train"), {}
    for task, language in (("translate-en-zh", "en"), ("translate-zh-en", "zh")):
        memory = NearestPair([(one.source, one.reference) for one in translations(training, task, language)])
        for kind, pairs in kinds.items():
            told(f"Nano-Chat: {task}, {kind}")
            asked = translations(pairs, task, language, count)
            wanted = [one.reference for one in asked]
            table[f"{task} {kind}"] = {
                "questions": len(asked),
                "chrF": chrf(answer([one.question for one in asked]), wanted),
                "nearest": chrf([memory.translate(one.source) for one in asked], wanted),
            }
    return table


def measure_chat(folder: Path, sizes: Sizes, template: str | None) -> dict[str, dict[str, Any]]:
    """The tables of tasks and of translation."""
    from aquila2_tut import AutoLoader
    from aquila2_tut.evaluate import ask

    loader = AutoLoader(model_name=str(folder), device="cpu", local_files_only=True)

    def answer(questions: list[str]) -> list[str]:
        return ask(loader.get_model(), loader.get_tokenizer(), questions, template=template)

    return {
        "tasks": measure_tasks(answer, sizes.questions),
        "translation": measure_translation(answer, sizes.questions),
    }


# --- the report ---

TITLES = {
    "held-out": "Bits per byte of held-out texts [95 %]",
    "sample": "Bits per byte of a sample of them: SmolLM2-135M-Instruct, and Nano on the same texts [95 %]",
    "tasks": "Right answers [95 %]",
    "translation": "chrF of translations, 0 to 100 [95 %]",
}


def report(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Prints tables as soon as they are there, and hands them on."""
    for name, rows in found.items():
        print(f"\n{TITLES[name]}\n{table_of(rows, 1 if name == 'translation' else 3)}", flush=True)
    return found


def table_of(rows: dict[str, dict[str, Any]], digits: int) -> str:
    """Lines with columns of one width each."""
    columns = list(next(iter(rows.values())))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(cell(row[column], digits) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def cell(value: Any, digits: int) -> str:
    """A count, or a figure with its interval."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def as_plain(value: Any) -> Any:
    """Estimates as objects with names, which JSON would make bare lists."""
    if isinstance(value, dict):
        return {key: as_plain(inner) for key, inner in value.items()}
    return value._asdict() if hasattr(value, "_asdict") else value


def main() -> None:
    """Measures what is there, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "data/Aquila2-Nano", metavar="FOLDER")
    parser.add_argument("--chat", type=Path, default=ROOT / "data/Aquila2-Nano-Chat", metavar="FOLDER")
    parser.add_argument("--template", help="the chat model's prompt format, instead of its own")
    parser.add_argument("--quick", action="store_true", help="a few texts and questions: to see that it works")
    parser.add_argument("--peer-bytes", type=int, help="bytes a source that SmolLM2 reads (default: 40,000)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes(peer_bytes=args.peer_bytes or Sizes.peer_bytes)
    found: dict[str, dict[str, Any]] = {}
    if args.model.is_dir():
        found |= report(measure_base(args.model, sizes))
    if args.chat.is_dir():
        found |= report(measure_chat(args.chat, sizes, args.template))
    if not found:
        raise SystemExit(f"there is neither {args.model} nor {args.chat}: nothing to measure")
    if args.json:
        args.json.write_text(json.dumps(as_plain(found), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
