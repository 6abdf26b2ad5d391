"""Several processes that search one study in a PostgreSQL database."""

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import paretomerge as pm
from paretomerge.record.record import Record
from paretomerge.record.storage import Storage
from paretomerge.record.trial import count_evaluated
from paretomerge.study.claims import PREFIX, Claims
from tests.postgresql import stoppable_server
from tests.study.test_workers import norm, total

SCORES = Path("scored")
BUDGET = 11


def counted(model, tokenizer):
    """Takes a while, and notes what it scored."""
    value = norm(model, tokenizer)
    with SCORES.open("a") as file:
        file.write(f"{value:.7f}\n")
    time.sleep(0.3)
    return value


@pytest.fixture(scope="module")
def server():
    with stoppable_server() as running:
        yield running


@pytest.fixture
def make(pico, tmp_path, monkeypatch, server, request):
    monkeypatch.chdir(tmp_path)

    def make(**settings):
        defaults = {
            "sampler": pm.MMMOSampler(seed=0, n_startup=6),
            "storage": server.url,
            "study_name": request.node.name,
            "budget": BUDGET,
        }
        return pm.Study(
            pico / "base",
            [pico / "ada", pico / "bob"],
            [pm.Function(counted), pm.Function(total, direction="minimize")],
            **defaults | settings,
        )

    return make


PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import paretomerge as pm
from tests.study.test_cooperation import counted, total

study = pm.Study(
    {base!r},
    [{ada!r}, {bob!r}],
    [pm.Function(counted), pm.Function(total, direction="minimize")],
    sampler=pm.MMMOSampler(seed=0, n_startup=6),
    storage={url!r},
    study_name={name!r},
    budget={budget},
)
study.optimize(show_progress_bar=False)
"""


def test_two_processes_share_the_work(make, pico, server, request, tmp_path):
    code = PROCESS.format(
        tests=str(Path(__file__).parents[2]),
        base=str(pico / "base"),
        ada=str(pico / "ada"),
        bob=str(pico / "bob"),
        url=server.url,
        name=request.node.name,
        budget=BUDGET,
    )
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    study = make()
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    # The last trial of each may begin at the same moment.
    assert BUDGET <= count_evaluated(trials) <= BUDGET + 1
    assert not [trial for trial in trials if trial.failure]
    labels = [trial.label for trial in trials if trial.label]
    assert len(labels) == len(set(labels))
    recipes = Counter(trial.recipe.key for trial in trials if trial.same_as is None)
    assert set(recipes.values()) == {1}
    assert all(trial.held_out for trial in study.front())
    record = Record.read(Storage(server.url, request.node.name))
    assert not any(record.notes(PREFIX).values())


def test_a_process_learns_what_another_has_found(make):
    first, second = make(), make()
    first.optimize(n_trials=3, held_out=False, show_progress_bar=False)
    seen = []

    def meanwhile(study, trial):
        seen.append(trial.number)
        if len(seen) == 1:
            first.optimize(n_trials=2, held_out=False, show_progress_bar=False)

    second.optimize(callbacks=[meanwhile], held_out=False, show_progress_bar=False)
    trials = second.get_trials()
    assert count_evaluated(trials) == BUDGET
    assert seen == [3, *range(6, len(trials))]


def test_claims_of_a_dead_process_of_this_machine_are_forgotten(make):
    study = make()
    study.optimize(n_trials=1, held_out=False, show_progress_bar=False)
    record = study.search().record
    one, other = Claims(record), Claims(record)
    one.claim("a key", {"weight": 0.5}, 0)
    assert [claim.key for claim in other.others(0)] == ["a key"]
    assert not other.others(1) and not one.others(0)
    other.claim("a key", {"weight": 0.5}, 0)
    assert one.is_contested("a key", 0) and other.is_contested("a key", 0)
    assert not one.is_contested("another key", 0)
    other.close()
    host, _, rest = one.owner.rsplit("/", 2)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    record.set_note(f"{PREFIX}{host}/{gone.pid}/{rest}", {"k": [{}, 0]})
    record.set_note(f"{PREFIX}elsewhere/1/{rest}", {"k": [{}, 0]})
    hosts = {claim.owner.split("/")[0] for claim in other.others(0)}
    assert hosts == {host, "elsewhere"}
    assert record.note(f"{PREFIX}{host}/{gone.pid}/{rest}") is None


def test_a_server_that_is_away_for_ten_seconds(make, server):
    study = make()
    stopped = []
    restart = threading.Timer(10, server.start)

    def callback(study, trial):
        if trial.number == 2:
            server.stop()
            stopped.append(time.monotonic())
            restart.start()

    try:
        study.optimize(
            n_trials=8, callbacks=[callback], held_out=False, show_progress_bar=False
        )
    finally:
        restart.join()
    assert time.monotonic() - stopped[0] > 9
    trials = make().get_trials()
    assert [trial.number for trial in trials] == list(range(8))
    assert len(SCORES.read_text().splitlines()) == 8
