"""The real vLLM, where it is installed.

PARETOMERGE_VLLM_PYTHON names the interpreter of an environment with vLLM; without it, `vllm-env` in
the project's folder is looked for. Each start of an engine takes a minute on a CPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.inference.language_model import ResidentLM
from paretomerge.evaluate.vllm.backend import VLLMBackend
from tests.conftest import REPOSITORY
from tests.evaluate.test_evaluate import harness
from tests.evaluate.vllm.test_backend import per_example, requests_of, single
from tests.evaluate.vllm.test_process import is_gone

PYTHON = Path(
    os.environ.get("PARETOMERGE_VLLM_PYTHON")
    or REPOSITORY / "vllm-env" / "bin" / "python"
)
ARGUMENTS = {"max_model_len": 64, "enforce_eager": True}
SCORES = ("reverse", "translate", "sort")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no vLLM: set PARETOMERGE_VLLM_PYTHON to the interpreter that has it",
    ),
]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    # On a CPU, vLLM takes gigabytes for keys and values by default.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def backend():
    engine = VLLMBackend(ARGUMENTS, python=str(PYTHON))
    yield engine
    engine.close()


def group_of(pid: int) -> list[int]:
    """The processes of a group that still run."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            # It has ended in the meantime.
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            pids.append(int(folder.name))
    return pids


def test_scores_and_faults(specialists, backend):
    models = {}
    for name in ("scribe", "mirror"):
        models[name] = single(specialists / "models" / name)
    there = harness(specialists, *SCORES, backend=backend)
    here = harness(specialists, *SCORES)
    expected = {name: here.evaluate(model, "search") for name, model in models.items()}
    for name in ("scribe", "mirror", "scribe"):
        scores = there.evaluate(replace(models[name]), "search")
        assert per_example(scores) == per_example(expected[name])
    assert (backend.n_starts, backend.n_swaps) == (1, 2)

    candidate = replace(models["mirror"])
    resident = ResidentLM(candidate.model, candidate.text_tokenizer, 4)
    prompts = [instance.args[0] for instance in there_requests(there)]
    settings = {"until": ["e"], "max_gen_toks": 8}
    written = requests_of("generate_until", *[(text, settings) for text in prompts])
    rolling = requests_of("loglikelihood_rolling", *[(text,) for text in prompts])
    with backend.load(candidate, 4) as model:
        assert model.generate_until(written) == resident.generate_until(written)
        assert model.loglikelihood_rolling(rolling) == pytest.approx(
            resident.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3
        )
        unknown = requests_of("generate_until", ("a", {**settings, "num_beams": 2}))
        with pytest.raises(EvaluationError, match="num_beams"):
            model.generate_until(unknown)
        assert model.generate_until(written[:1])
        engine = backend._worker.pid
        os.kill(max(group_of(engine)), signal.SIGKILL)
        with pytest.raises(EvaluationError, match="vLLM"):
            for _ in range(20):
                model.generate_until(written)
                time.sleep(0.5)
    scores = there.evaluate(replace(models["scribe"]), "search")
    assert per_example(scores) == per_example(expected["scribe"])
    assert backend.n_starts == 2
    assert not group_of(engine)


def there_requests(evaluator):
    examples = evaluator.examples("search")["reverse"]
    return [instances[0] for instances in examples.requests[:10]]


DRIVER = """
import json, sys
from pathlib import Path
from paretomerge.evaluate.vllm.backend import VLLMBackend
from tests.evaluate.vllm.test_backend import single
backend = VLLMBackend(json.loads(sys.argv[1]), python=sys.argv[2])
with backend.load(single(Path(sys.argv[3])), 4) as model:
    print(backend._worker.pid, flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_a_driver_that_is_killed(specialists):
    before = set(Path("/dev/shm").iterdir())
    model = specialists / "models" / "scribe"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(ARGUMENTS), PYTHON, model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        text=True,
    )
    with driver:
        pid = int(driver.stdout.readline())
        processes = group_of(pid)
        assert len(processes) > 1
        driver.kill()
        driver.wait(30)
        assert all(is_gone(process) for process in processes)
    # Python's resource tracker removes what is left, once all others have ended.
    for _ in range(50):
        left = set(Path("/dev/shm").iterdir()) - before
        if not left:
            break
        time.sleep(0.1)
    assert not left
