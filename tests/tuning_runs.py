"""Small fine-tuning runs, also in processes of their own, for tests that kill them."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
NANO = Path(__file__).resolve().parent.parent / "data" / "Aquila2-Nano"
PLAIN = {
    "template": "aquila-v1",
    "length": 64,
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup": 1,
    "dropout": 0.0,
    "precision": "float32",
    "save_every": 2,
    "keep": 10,
    "log_every": 1,
}


def some_base(folder: Path, **changes) -> Path:
    """A tiny model with the vocabulary of Nano."""
    import torch

    from aquila2_tut import Aquila2Config, Aquila2ForCausalLM

    torch.manual_seed(0)
    ids = json.loads((NANO / "config.json").read_text())
    ids = {name: ids[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    Aquila2ForCausalLM(Aquila2Config(**{**SHAPE, **ids, **changes})).save_pretrained(folder)
    shutil.copy(NANO / "tokenizer.json", folder)
    return folder


def some_conversations(file: Path, count: int = 24, seed: int = 0) -> Path:
    """Questions in words that a seed has thrown together, and answers that repeat the first word."""
    dice = random.Random(seed)
    words = ["one", "two", "three", "four", "five", "red", "green", "blue", "一", "二", "三", "红", "绿", "蓝"]
    samples = []
    for number in range(count):
        said = dice.choices(words, k=dice.randint(2, 6))
        turns = [{"from": "human", "value": " ".join(said)}, {"from": "gpt", "value": f"{said[0]} {said[0]}"}]
        samples.append({"id": str(number), "conversations": turns})
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return file


def small_tuning(base: Path, data: Path, **changes):
    from aquila2_tut.train import Tuning

    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return Tuning(base=str(base), data=str(data), **{**PLAIN, **changes})


def run(base: Path, data: Path, folder: Path, changes: dict) -> None:
    """What a child process does."""
    import torch

    from aquila2_tut import AutoLoader
    from aquila2_tut.train import finetune

    torch.set_num_threads(1)
    finetune(small_tuning(base, data, **changes), folder, AutoLoader)


# --- several processes -----------------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def torchrun(processes: int, *command: str, timeout: float = 200, **variables: str) -> subprocess.CompletedProcess:
    """Runs a file or a module (-m NAME) in several processes that know of each other."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    start += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    paths = os.pathsep.join([str(NANO.parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    options = {"capture_output": True, "text": True, "env": environment, "check": False, "timeout": timeout}
    return subprocess.run([*start, *map(str, command)], **options)


def run_noted(base: Path, data: Path, folder: Path, changes: dict, dies_at: int = 0) -> None:
    """What each of several processes does: a run, and a note `rank-N.json` of what it saw.

    Args:
        dies_at: the step after which the last process is killed as by the system; 0 for none.
    """
    import torch
    from torch.distributed.tensor import DTensor

    from aquila2_tut import AutoLoader
    from aquila2_tut.train import finetune, finetuning
    from aquila2_tut.train.sharding import own_bytes
    from aquila2_tut.train.tuner import Tuner

    rank, last = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    note = {}

    class Noted(Tuner):
        def _maybe_log_save_evaluate(self, *arguments, **options):
            parameters = list(self.model.parameters())
            note.update(
                split=sum(isinstance(p, DTensor) for p in parameters) / len(parameters),
                weights=[own_bytes(parameters), sum(p.numel() * p.itemsize for p in parameters)],
                states=own_bytes(self.optimizer.state_dict()),
            )
            super()._maybe_log_save_evaluate(*arguments, **options)
            if dies_at == self.state.global_step and rank == last - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    finetuning.Tuner = Noted
    torch.set_num_threads(1)
    finetune(small_tuning(base, data, **changes), folder, AutoLoader)
    folder.joinpath(f"rank-{rank}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_noted(*(Path(given[name]) for name in ("base", "data", "folder")), given["changes"], given.get("dies_at", 0))
