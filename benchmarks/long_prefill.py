"""Reading a long prompt on a CPU: this package against transformers' LlamaForCausalLM with the same weights.

Prefill of 512 to 8,192 tokens with SmolLM2-135M in float32, one row, into a cache, in `inference_mode`; the sides are
in one process and take turns, the best turn of each counts. transformers runs with sdpa and scores the last position
only (`logits_to_keep=1`), as its `generate` does. Ours runs in one piece and in pieces of 512. `--more` adds ours with
all products by torch, as in `torch_products`, which tells what oneDNN gains, and transformers scoring every position,
as `model(ids)` does.

With one thread the processor's time counts, which other programs on the machine hardly disturb; with more, the clock.
Prints tokens a second, the ratio to transformers, and the growth: how many times longer the next length takes.

    python benchmarks/long_prefill.py [--rounds 3] [--threads 1] [--lengths 512 1024 2048 4096 8192] [--more]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aquila2_tut import AutoLoader
from aquila2_tut.chat import prefill
from aquila2_tut.model import torch_products

PEER, CHUNK = "transformers", 512
Side = Callable[[torch.Tensor], torch.Tensor]


def peer_of(ours) -> LlamaForCausalLM:
    """transformers' model on the very tensors of ours."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    keys += ("rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")
    config = LlamaConfig(**{key: getattr(ours.config, key) for key in keys}, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(ours.state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is in no state_dict
    return model.eval()


def sides(ours, peer: LlamaForCausalLM, more: bool) -> dict[str, Side]:
    """Each reads a prompt and returns the last position's logits."""

    def by_torch(ids):
        with torch_products():
            return prefill(ours, ids).logits[:, -1]

    found: dict[str, Side] = {
        PEER: lambda ids: peer(ids, use_cache=True, logits_to_keep=1).logits[:, -1],
        "ours": lambda ids: prefill(ours, ids).logits[:, -1],
        f"ours, by {CHUNK}": lambda ids: prefill(ours, ids, CHUNK).logits[:, -1],
    }
    if more:
        found["ours, torch only"] = by_torch
        found[f"{PEER}, all logits"] = lambda ids: peer(ids, use_cache=True).logits[:, -1]
    return found


@torch.inference_mode()
def measure(turns: dict[str, Side], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """The best of each side's turns in seconds; each has to give the peer's logits."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best, wanted = dict.fromkeys(turns, float("inf")), None
    for _ in range(rounds):
        for name, turn in turns.items():
            start = now()
            logits = turn(ids)
            best[name] = min(best[name], now() - start)
            wanted = logits if wanted is None else wanted
            if not (worst := (logits - wanted).abs().max().item()) < 1e-3:
                raise SystemExit(f"{name}: logits differ from {PEER}' by {worst}")
    return best


def main() -> None:
    """Takes turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--more", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loader = AutoLoader("aquila2", model_name="SmolLM2-135M", device="cpu", torch_dtype="float32")
    ours = loader.get_model()
    turns = sides(ours, peer_of(ours), args.more)
    ids = torch.randint(10, ours.config.vocab_size, (1, max(args.lengths)), generator=torch.Generator().manual_seed(0))
    print(f"SmolLM2-135M, float32, {args.threads} thread(s), best of {args.rounds} turns; tokens/s, ratio, growth")
    print(f"{'tokens':>8}" + "".join(f"{name:>28}" for name in turns), flush=True)
    measure(turns, ids[:, :300], 1)  # what only the first call takes
    before: dict[str, float] = {}
    for length in args.lengths:
        best = measure(turns, ids[:, :length], args.rounds)
        cells = (f"{length / best[n]:9.0f} x{best[PEER] / best[n]:.2f}" for n in turns)
        grown = (f"  x{best[n] / before[n]:.2f}" if before else "" for n in turns)
        print(f"{length:8}" + "".join(f"{c + g:>28}" for c, g in zip(cells, grown, strict=True)), flush=True)
        before = best


if __name__ == "__main__":
    main()
