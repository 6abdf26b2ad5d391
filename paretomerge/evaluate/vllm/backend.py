"""Give candidates to one vLLM engine, and check that it has them."""

import hashlib
import itertools
import json
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.errors import EvaluationError, unknown_name
from paretomerge.evaluate.backend import DEFAULT_OPTIONS, ModelOptions
from paretomerge.evaluate.checkpoint_folder import (
    checkpoint_parent,
    shared_memory,
    write_checkpoint,
)
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.model_kind import ModelKind
from paretomerge.evaluate.time_limit import suspended_time_limit
from paretomerge.evaluate.vllm.probe import Probe, probe
from paretomerge.evaluate.vllm.process import SETUP, Worker, WorkerError

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

    from paretomerge.evaluate.vllm.language_model import EngineLM

WORKER = Path(__file__).with_name("worker.py")
"""The file that vLLM's interpreter runs; it answers the calls of `worker.Engine`."""

DEFAULT_TIMEOUT = 3600.0
"""Seconds that one answer of the engine may take: its start, a swap, or a batch of requests."""

# Mean differences in nats. docs/lab/vllm.md has those of equal and of other weights.
_TOLERANCES = {"float32": 0.001}
_TOLERANCE_OF_HALVES = 0.15


_MODEL_FILES = ("config.json", "generation_config.json")


@dataclass
class _Engine:
    """A running engine.

    Attributes:
        layout: What all its candidates have in common.
        tokenizer: The tokenizer that it writes text with, or one with the same files.
        tokenizer_digest: Of these files.
        max_length: The most tokens of a sequence.
        tolerance: The largest difference of a probe.
        reference: The latest probe.
        answer: The engine's answer to it.
    """

    layout: str
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_digest: str
    max_length: int
    tolerance: float
    reference: Probe | None = None
    answer: list[float] | None = None


class VLLMBackend:
    """One vLLM engine, in a process of its own, for all candidates of a study.

    The engine starts with the first candidate. For each later one only its weights are replaced:
    they are written to memory-backed storage, and vLLM reads them. Then the log-probabilities of a
    fixed prompt must be those that transformers computes from the model in memory. If they are not,
    the engine is started anew with the candidate.

    A candidate of another shape, such as a route of another length, starts an engine, too.

    Args:
        arguments: Arguments of `vllm.LLM`, beside `model`.
        python: The interpreter of an environment with vLLM; by default the present one.
        timeout: Seconds that an answer of the engine may take.
        tolerance: The largest mean difference of the prompt's log-probabilities, in nats; by
            default 0.001 for engines in float32, and 0.15 for all others.
        script: What the interpreter runs in place of `WORKER`.

    Attributes:
        key: Distinguishes scores of this backend from others, for caches.
        n_starts: How many times an engine was started.
        n_swaps: How many times weights were replaced.
        seconds: What the latest start and the latest swap took, by `start` and `swap`. The writing
            of the checkpoint and the check of the weights are included.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any] | None = None,
        *,
        python: str = sys.executable,
        timeout: float = DEFAULT_TIMEOUT,
        tolerance: float | None = None,
        script: Path | None = None,
    ) -> None:
        self._arguments = dict(arguments or {})
        self._python = python
        self._timeout = timeout
        self._tolerance = tolerance
        self._script = script or WORKER
        self.key = f"vllm {json.dumps(self._arguments, sort_keys=True, default=str)}"
        self.n_starts = 0
        self.n_swaps = 0
        self.seconds: dict[str, float] = {}
        self._numbers = itertools.count(1)
        self._worker: Worker | None = None
        self._folder: Path | None = None
        self._remove_folder: weakref.finalize[Any, Any] | None = None
        self._engine: _Engine | None = None
        # Weak: a candidate may hold gigabytes, and is never asked again once it is gone.
        self._current: weakref.ref[Candidate] | None = None
        self._models: dict[ModelOptions, EngineLM] = {}

    def check(self, kind: ModelKind, scores: str) -> None:
        """Check that the engine can be started for models of a kind.

        vLLM is imported, which takes seconds; the process stays for the first candidate.

        Args:
            kind: What the models are.
            scores: The scores that the engine is needed for.

        Raises:
            EvaluationError: The interpreter does not run or has no vLLM, vLLM cannot replace
                weights or does not know an argument, or the models are no decoders.
        """
        kind.check_is_decoder(scores)
        self._running_worker()

    @contextmanager
    def load(
        self,
        candidate: Candidate,
        batch_size: int,
        options: ModelOptions = DEFAULT_OPTIONS,
    ) -> "Iterator[LM]":
        """Put a candidate into the engine, unless it is there.

        Args:
            candidate: The merge.
            batch_size: Ignored: vLLM makes its batches itself, as `max_num_seqs` says.
            options: How text goes into the model and comes out of it.

        Yields:
            A model of lm-evaluation-harness; it is valid until the next candidate is loaded.

        Raises:
            EvaluationError: The engine cannot be started, or its weights are not the candidate's.
        """
        # The harness takes seconds to import.
        from paretomerge.evaluate.vllm.language_model import EngineLM

        self._put(candidate)
        assert self._engine is not None
        tokenizer = candidate.text_tokenizer
        model = self._models.get(options)
        # The encoded requests belong to one tokenizer.
        if model is None or model.given_tokenizer is not tokenizer:
            model = EngineLM(tokenizer, options, self._call)
            self._models[options] = model
        model.max_length = self._engine.max_length
        yield model

    def close(self) -> None:
        """End the engine's process; the next candidate starts another one."""
        self._engine = None
        self._current = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._remove_folder is not None:
            self._remove_folder()

    def _call(self, method: str, **arguments: Any) -> Any:
        assert self._worker is not None
        return self._worker.call(method, **arguments)

    def _put(self, candidate: Candidate) -> None:
        is_running = self._worker is not None and self._worker.is_running
        if not is_running:
            self.close()
        if self._current is not None and self._current() is candidate:
            return
        self._current = None
        since = time.perf_counter()
        if self._replace(candidate):
            self.seconds["swap"] = time.perf_counter() - since
        else:
            since = time.perf_counter()
            self._start(candidate)
            self.seconds["start"] = time.perf_counter() - since
        self._current = weakref.ref(candidate)

    def _replace(self, candidate: Candidate) -> bool:
        """Replace the weights; False where the engine cannot take them, or does not have them."""
        engine = self._engine
        if engine is None:
            return False
        before, answer_before = engine.reference, engine.answer
        try:
            with self._written(candidate) as folder:
                if not _fits(engine, candidate, folder):
                    return False
                self._call("replace", model=str(folder))
            self._ask(engine, candidate)
        except WorkerError:
            # vLLM may have replaced some of the weights, so a new engine is started.
            return False
        self.n_swaps += 1
        assert engine.reference is not None and engine.answer is not None
        # The same answer to the bit from other weights: they are those of the model before, which
        # the tolerance cannot tell where two candidates are much alike.
        if engine.reference != before and engine.answer == answer_before:
            return False
        return engine.reference.difference(engine.answer) <= engine.tolerance

    def _start(self, candidate: Candidate) -> None:
        """Start an engine with a candidate."""
        # An engine needs the memory of the one before.
        if self._engine is not None:
            self.close()
        # It happens once, and limits are for what every candidate takes.
        with suspended_time_limit():
            worker = self._running_worker()
            # vLLM's own choice for merges in float32 is a half.
            arguments = {"dtype": _dtype(candidate), **self._arguments}
            with self._written(candidate) as folder:
                layout, tokenizer_digest = _layout(folder), _tokenizer_digest(folder)
                started = worker.call("start", model=str(folder), arguments=arguments)
        self.n_starts += 1
        dtype = started["dtype"]
        tolerance = self._tolerance
        if tolerance is None:
            tolerance = _TOLERANCES.get(dtype, _TOLERANCE_OF_HALVES)
        engine = _Engine(
            layout,
            candidate.text_tokenizer,
            tokenizer_digest,
            started["max_length"],
            tolerance,
        )
        self._engine = engine
        self._ask(engine, candidate)
        assert engine.reference is not None and engine.answer is not None
        difference = engine.reference.difference(engine.answer)
        # NaN fails this comparison, too.
        if not difference <= tolerance:
            self.close()
            raise EvaluationError(
                "a fixed prompt's log-probabilities in vLLM differ from those in transformers by "
                f"{difference:.2g} nats a token, although vLLM was started anew. At most "
                f"{tolerance:g} are allowed (`tolerance` of `evaluate.backend`). vLLM computes in "
                f"{dtype}, the merges are in {_dtype(candidate)}"
            )

    def _ask(self, engine: _Engine, candidate: Candidate) -> None:
        """Compute the probe with both engines."""
        # vLLM needs room for one more token.
        reference = probe(candidate, engine.max_length - 1)
        ((answer, _),) = self._call(
            "log_likelihoods", prompts=[reference.tokens], starts=[1]
        )
        engine.reference, engine.answer = reference, answer

    @contextmanager
    def _written(self, candidate: Candidate) -> Iterator[Path]:
        """The candidate as files, which are removed when the engine has read them."""
        assert self._folder is not None
        # vLLM may remember what it has read from a folder, so each has a name of its own.
        parent = self._folder
        if checkpoint_parent(candidate) is None:
            parent = Path(tempfile.gettempdir())
        prefix = f"paretomerge-{next(self._numbers)}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder:
            write_checkpoint(candidate, Path(folder))
            yield Path(folder)

    def _running_worker(self) -> Worker:
        """The process; it is started and checked unless it runs."""
        if self._worker is not None and self._worker.is_running:
            return self._worker
        self.close()
        self._folder = Path(
            tempfile.mkdtemp(prefix="paretomerge-", dir=shared_memory())
        )
        self._remove_folder = weakref.finalize(
            self, shutil.rmtree, self._folder, ignore_errors=True
        )
        command = [self._python, str(self._script), str(self._folder)]
        worker = Worker(command, self._timeout)
        try:
            found = worker.call("check", arguments=self._arguments)
            self._check_answer(found)
        except WorkerError as error:
            raise EvaluationError(
                f"evaluate.backend: {self._python} cannot run vLLM: {error}. Make an environment "
                f"with it, {SETUP}, and set `python: vllm-env/bin/python`"
            ) from error
        except EvaluationError:
            worker.close()
            raise
        self._worker = worker
        return worker

    def _check_answer(self, found: Mapping[str, Any]) -> None:
        version = found["version"]
        for name in found["unknown"]:
            problem = unknown_name("argument", name, found["known"])
            raise EvaluationError(f"evaluate.backend: vLLM {version}: {problem}")
        if not found["replaces"]:
            raise EvaluationError(
                f"evaluate.backend: vLLM {version} in {self._python} cannot replace weights. "
                "Install a later version: pip install --upgrade vllm"
            )


def _dtype(candidate: Candidate) -> str:
    return str(candidate.model.dtype).removeprefix("torch.")


def _fits(engine: _Engine, candidate: Candidate, folder: Path) -> bool:
    """Whether an engine can take the weights of a candidate that is written in a folder."""
    if engine.layout != _layout(folder):
        return False
    tokenizer = candidate.text_tokenizer
    # Calls of a tokenizer may change what it writes: not how it reads, but how it pads.
    if tokenizer is engine.tokenizer:
        return True
    if engine.tokenizer_digest != _tokenizer_digest(folder):
        return False
    engine.tokenizer = tokenizer
    return True


def _layout(folder: Path) -> str:
    """Digest of a checkpoint's configs and of the names and shapes of its tensors."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                # The format: eight bytes with the length of the header, and the header.
                length = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(length))
        elif file.name in _MODEL_FILES:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _tokenizer_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix != ".safetensors" and file.name not in _MODEL_FILES:
            digest.update(file.read_bytes())
    return digest.hexdigest()
