"""The oracle's side of the conversation: mergekit's public API, driven by JSON lines. Executed by the oracle's python.

In:  {"recipe": path, "out": path, "seed": int, "chain": bool}; `chain` for a recipe of several documents (mergekit-multi).
Out: {"ok": bool, "error": str, "seconds": float}, after one {"version": str} at the start.

It imports nothing of paretomerge or of the tests, which live in another environment.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    # The answers need a pipe of their own: libraries print progress bars and warnings to stdout as they please.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(1)

    def merge(request: dict) -> None:
        options = MergeOptions(
            random_seed=request["seed"],
            lora_merge_cache=request["out"] + ".lora",
            write_model_card=False,
            quiet=True,
            num_threads=1,
        )
        text = Path(request["recipe"]).read_text(encoding="utf-8")
        if request.get("chain"):
            return chain(text, request["out"], options)
        return run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(text)),
            request["out"],
            options,
            text,
        )

    def chain(text: str, out: str, options: MergeOptions) -> None:
        from click.testing import CliRunner
        from mergekit.scripts.multimerge import main as multi

        file = Path(out + ".yml")
        file.write_text(text, encoding="utf-8")
        arguments = [
            str(file),
            "--intermediate-dir",
            out + ".steps",
            "--out-path",
            out,
            "--random-seed",
            str(options.random_seed),
        ]
        result = CliRunner().invoke(multi, arguments)
        if result.exception is not None:
            raise result.exception

    print(json.dumps({"version": version("mergekit")}), file=answers)
    for line in sys.stdin:
        start = time.perf_counter()
        answer = {"ok": True, "error": ""}
        try:
            merge(json.loads(line))
        except BaseException as error:  # the conversation goes on, whatever a recipe does, SystemExit included
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        print(
            json.dumps(answer | {"seconds": time.perf_counter() - start}), file=answers
        )


if __name__ == "__main__":
    main()
