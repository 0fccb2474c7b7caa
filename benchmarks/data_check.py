"""Checking a file of conversations: megabytes a second and peak memory, beside parsing it with `json` alone.

Seconds are of processor time, which other work on the machine disturbs least. A file is generated for each form,
checked in a process of its own, and deleted. "json alone" is `json.loads` of each line, and `json.load` of the list,
which holds all of it: with less memory, run it with fewer megabytes.

    python benchmarks/data_check.py [--megabytes 1000]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = "the model reads one token after another 北京 的 十大 景点 “quoted” {brackets} because of attention".split()  # noqa: SIM905

CHECK = "from aquila2_tut.data import check_file; found = sum(1 for _ in check_file(path))"
LINES = "import json; found = sum(json.loads(line) is None for line in open(path, 'rb'))"
WHOLE = "import json; found = sum(each is None for each in json.load(open(path, 'rb')))"
SIDES = {"a.jsonl": {"checked": CHECK, "json alone": LINES}, "a.json": {"checked": CHECK, "json alone": WHOLE}}

RUN = """
import resource, sys, time
path = sys.argv[1]
begin = time.process_time()
{code}
print(time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, found)
"""


def write(path: Path, size: int) -> int:
    """Write samples until there are so many bytes; return how many samples."""
    dice, number = random.Random(0), 0
    begin, between, end = (b"[\n", b",\n", b"\n]\n") if path.suffix == ".json" else (b"", b"\n", b"\n")
    with path.open("wb") as out:
        out.write(begin)
        while out.tell() < size:
            turns = [{"from": r, "value": " ".join(dice.choices(WORDS, k=80)) + "\n"} for r in ("human", "gpt") * 2]
            sample = {"id": f"sample_{number}", "conversations": turns, "instruction": ""}
            out.write((between if number else b"") + json.dumps(sample, ensure_ascii=number % 2 == 0).encode())
            number += 1
        out.write(end)
    return number


def measure(code: str, path: Path) -> tuple[float, float]:
    """Processor seconds and peak MiB of a process that runs the code."""
    done = subprocess.run([sys.executable, "-c", RUN.format(code=code), path], capture_output=True, check=True)
    seconds, mebibytes, found = done.stdout.split()
    assert found == b"0", "the generated file has no fault"
    return float(seconds), float(mebibytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    size = parser.parse_args().megabytes * 10**6
    print(f"{'file':10}{'samples':>10}  {'how':12}{'seconds':>9}{'MB/s':>8}{'peak MiB':>10}")
    for name, sides in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            samples = write(path, size)
            for how, code in sides.items():
                seconds, peak = measure(code, path)
                print(
                    f"{name:10}{samples:10,}  {how:12}{seconds:9.1f}{size / 1e6 / seconds:8.1f}{peak:10.0f}", flush=True
                )


if __name__ == "__main__":
    main()
