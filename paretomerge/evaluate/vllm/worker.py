"""The process that holds a vLLM engine and answers calls.

It runs in an environment that has vLLM and need not have paretomerge or lm-evaluation-harness, so
this file imports neither. A call is one line of JSON on stdin, its answer one line on stdout:

    {"id": 1, "method": "start", "arguments": {...}}
    {"id": 1, "result": ...}        what the method returned
    {"id": 1, "refused": "..."}     the call makes no sense; the engine is as before
    {"id": 1, "error": "..."}       the method failed; the engine cannot be trusted any more

Whatever vLLM prints goes to stderr. When stdin is closed, nobody asks any more: the temporary
folder is removed, and all processes of vLLM are ended.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Protocol, TextIO

_GRACE = 5.0  # seconds that vLLM's processes have to end by themselves

METHODS = ("check", "start", "replace", "log_likelihoods", "generate")

Tokens = list[int]


class RefusedError(Exception):
    """The arguments of a call are wrong; the message says which."""


class Engine(Protocol):
    """What answers the calls; each method is a call of the same name."""

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Check that an engine can be started.

        Args:
            arguments: What `start` is going to get.

        Returns:
            `version`: the version of vLLM. `replaces`: whether weights can be replaced.
            `unknown`: the names of arguments that this version does not have. `known`: all names.
        """

    def start(self, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Start the engine with a model.

        Args:
            model: The folder of a checkpoint.
            arguments: Arguments of `vllm.LLM`.

        Returns:
            `max_length`: the most tokens of a sequence. `dtype`: of the weights in the engine.
        """

    def replace(self, model: str) -> None:
        """Replace the weights by those of another checkpoint of the same shapes."""

    def log_likelihoods(
        self, prompts: list[Tokens], starts: list[int]
    ) -> list[list[Any]]:
        """Log-probabilities of tokens.

        Args:
            prompts: Token ids.
            starts: The first token of each prompt whose log-probability is asked, from 1.

        Returns:
            For each prompt the log-probabilities of its tokens from there on, and whether each of
            these tokens is the most likely one.
        """

    def generate(
        self, prompts: list[Tokens], settings: list[dict[str, Any]]
    ) -> list[str]:
        """Write texts.

        Args:
            prompts: Token ids.
            settings: Arguments of `vllm.SamplingParams` for each prompt.

        Returns:
            The texts.
        """


class VLLMEngine:
    """A `vllm.LLM`. vLLM is imported by the first call, since this takes seconds."""

    def __init__(self) -> None:
        self._llm: Any = None

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `Engine.check`."""
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        known = {field.name for field in dataclasses.fields(EngineArgs)}
        known |= set(inspect.signature(vllm.LLM.__init__).parameters)
        known -= {"self", "kwargs", "model"}
        reload_parameters = inspect.signature(GPUModelRunner.reload_weights).parameters
        return {
            "version": vllm.__version__,
            "replaces": "weights_path" in reload_parameters,
            "unknown": sorted(set(arguments) - known),
            "known": sorted(known),
        }

    def start(self, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `Engine.start`."""
        import vllm

        self._llm = vllm.LLM(model=model, **arguments)
        config = self._llm.llm_engine.model_config
        return {
            "max_length": int(config.max_model_len),
            "dtype": str(config.dtype).removeprefix("torch."),
        }

    def replace(self, model: str) -> None:
        """See `Engine.replace`."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        # Keys and values of prompts that the model before has read.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def log_likelihoods(
        self, prompts: list[Tokens], starts: list[int]
    ) -> list[list[Any]]:
        """See `Engine.log_likelihoods`."""
        import vllm

        # vLLM writes at least one token, which nobody reads.
        params = vllm.SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False
        )
        answers = []
        outputs = self._outputs(prompts, params)
        for output, prompt, start in zip(outputs, prompts, starts, strict=True):
            log_probabilities = []
            is_greedy = True
            for i in range(start, len(prompt)):
                # The token of the prompt and the most likely one, which may be the same.
                entries = output.prompt_logprobs[i]
                log_probability = entries[prompt[i]].logprob
                best = max(entry.logprob for entry in entries.values())
                is_greedy = is_greedy and log_probability >= best
                log_probabilities.append(log_probability)
            answers.append([log_probabilities, is_greedy])
        return answers

    def generate(
        self, prompts: list[Tokens], settings: list[dict[str, Any]]
    ) -> list[str]:
        """See `Engine.generate`."""
        import vllm

        params = []
        for setting in settings:
            try:
                params.append(vllm.SamplingParams(**setting))
            except (TypeError, ValueError) as error:
                raise RefusedError(str(error)) from error
        outputs = self._outputs(prompts, params)
        return [output.outputs[0].text for output in outputs]

    def _outputs(self, prompts: list[Tokens], params: Any) -> list[Any]:
        import vllm

        inputs = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs: list[Any] = self._llm.generate(inputs, params, use_tqdm=False)
        return outputs


def serve(engine: Engine, folder: str) -> None:
    """Answer calls until stdin is closed.

    Args:
        engine: Answers them.
        folder: The temporary folder of the process that asks, which is removed when it is gone.
    """
    calls, answers = _take_over_pipes()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    # A thread of its own, so that a closed pipe is noticed while the engine works.
    reader = threading.Thread(target=_read, args=(calls, lines, folder), daemon=True)
    reader.start()
    while True:
        call = json.loads(lines.get())
        answer = _answer(engine, call["method"], call["arguments"])
        answers.write(json.dumps({"id": call["id"], **answer}) + "\n")
        answers.flush()


def _answer(engine: Engine, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if method not in METHODS:
        return {"refused": f"there is no method {method!r}"}
    try:
        return {"result": getattr(engine, method)(**arguments)}
    except RefusedError as error:
        return {"refused": str(error)}
    # vLLM may raise anything. The process that asks decides what becomes of it.
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _take_over_pipes() -> tuple[TextIO, TextIO]:
    """The pipes behind stdin and stdout, which nobody else may read or write from now on."""
    calls = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    # Prints of Python, of C libraries and of child processes.
    os.dup2(2, 1)
    return calls, answers


def _read(calls: TextIO, lines: "queue.SimpleQueue[str]", folder: str) -> None:
    for line in calls:
        lines.put(line)
    shutil.rmtree(folder, ignore_errors=True)
    # First the polite way, in which vLLM frees its shared memory.
    deadline = time.monotonic() + _GRACE
    for pid in _others_in_group():
        _send(pid, signal.SIGTERM)
    while _others_in_group() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in _others_in_group():
        _send(pid, signal.SIGKILL)
    # The main thread may be deep in a computation, which nobody waits for.
    os._exit(0)


def _others_in_group() -> list[int]:
    """The processes that vLLM has started.

    Python's resource trackers are left out: they end by themselves, after they have removed what
    killed processes have left in shared memory.
    """
    own_group = os.getpgrp()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            in_group = os.getpgid(pid) == own_group
            command = (folder / "cmdline").read_bytes()
        except OSError:
            # It has ended in the meantime.
            continue
        # A process that has ended and waits for its parent has no command line.
        if in_group and command and b"resource_tracker" not in command:
            pids.append(pid)
    return [pid for pid in pids if pid != os.getpid()]


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    """Serve a vLLM engine; the argument is the temporary folder."""
    # The folder of this file comes first there, and its other files are no modules for vLLM.
    own_folder = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    sys.path[:] = [path for path in sys.path if path != own_folder]
    serve(VLLMEngine(), sys.argv[1])


if __name__ == "__main__":
    main()
