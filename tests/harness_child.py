"""An evaluation in a process of its own, slow enough to be killed; a helper of `test_harness_resume.py`."""

import json
import sys
import time
from pathlib import Path


def main(folder: Path, place: Path) -> None:
    import torch
    from lm_eval.api.instance import Instance

    from aquila2_tut import AutoLoader
    from aquila2_tut.evaluate.harness import HarnessModel
    from aquila2_tut.evaluate.journal import Journal

    torch.set_num_threads(1)
    loader = AutoLoader("aquila2", model_name=str(folder), device="cpu")
    model, asked = loader.get_model(), [0]
    forward = model.model.forward

    def slowly(**given):
        time.sleep(0.01)
        asked[0] += given["input_ids"].numel()
        return forward(**given)

    model.model.forward = slowly
    harness = HarnessModel(model, loader.get_tokenizer(), 1, journal=Journal(place / "journal"), progress=False)
    scored = [(f"The number {n % 7} is followed by", f" {n} and {n + 1}") for n in range(60)]
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [(f"Count from {n}:", settings) for n in range(20)]
    results = {
        "scored": harness.loglikelihood(
            [Instance("loglikelihood", {}, one, n, metadata=("s", n, 1)) for n, one in enumerate(scored)]
        ),
        "generated": harness.generate_until(
            [Instance("generate_until", {}, one, n, metadata=("g", n, 1)) for n, one in enumerate(prompts)]
        ),
    }
    (place / "results.json").write_text(json.dumps({**results, "asked": asked[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
