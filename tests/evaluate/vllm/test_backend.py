"""Scores by an engine in another process: those of the model in memory, or a clear failure.

The engine is a Llama in NumPy behind vLLM's protocol; `test_vllm.py` has the real one.
"""

import os
import signal
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import paretomerge as pm
from paretomerge.errors import ConfigError, EvaluationError
from paretomerge.evaluate import checkpoint_folder
from paretomerge.evaluate.backend import ModelOptions
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.inference.language_model import ResidentLM
from paretomerge.evaluate.model_kind import ModelKind
from paretomerge.evaluate.time_limit import enforce_time_limit, suspended_time_limit
from paretomerge.evaluate.vllm.backend import VLLMBackend
from tests.evaluate.test_evaluate import harness, live
from tests.evaluate.vllm.engines import FILE

SCORES = ("reverse", "translate")
NAMES = ("scribe", "mirror")


def single(folder):
    candidate = live(folder)
    return replace(candidate, model=candidate.model.float())


@pytest.fixture(scope="module")
def models(specialists):
    return {name: single(specialists / "models" / name) for name in NAMES}


@pytest.fixture(scope="module")
def expected(specialists, models):
    evaluator = harness(specialists, *SCORES)
    return {
        name: evaluator.evaluate(candidate, "search")
        for name, candidate in models.items()
    }


@pytest.fixture(scope="module")
def healthy():
    backend = VLLMBackend(script=FILE)
    yield backend
    backend.close()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Backends whose engine fails."""
    monkeypatch.setattr(checkpoint_folder, "_SHARED_MEMORY", tmp_path / "shared")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "shared").mkdir()
    backends = []

    def make(kind, method="", timeout=120, once=False, **options):
        fault = {"kind": kind, "method": method}
        if once:
            fault["once"] = str(tmp_path / "once")
        backend = VLLMBackend({"fault": fault}, script=FILE, timeout=timeout, **options)
        backends.append(backend)
        return backend

    yield make
    for backend in backends:
        backend.close()
    assert not list((tmp_path / "shared").iterdir())


def per_example(scores):
    return {name: score.example_scores for name, score in scores.items()}


def test_one_engine_scores_all_candidates(specialists, models, expected, healthy):
    evaluator = harness(specialists, *SCORES, backend=healthy, held_out_items=20)
    for name in ("scribe", "mirror", "scribe"):
        candidate = replace(models[name])
        scores = evaluator.evaluate(candidate, "search")
        assert per_example(scores) == per_example(expected[name])
        # The same candidate is not given to the engine again.
        swaps = healthy.n_swaps
        assert evaluator.evaluate(candidate, "search") == scores
        assert healthy.n_swaps == swaps
    assert (healthy.n_starts, healthy.n_swaps) == (1, 2)
    assert evaluator.evaluate(models["mirror"], "held_out")


def requests_of(kind, *arguments):
    return [
        SimpleNamespace(args=each, request_type=kind, repeats=1) for each in arguments
    ]


OPTIONS = (
    ModelOptions(),
    ModelOptions(add_bos_token=False),
    ModelOptions(think_end_token="c", add_bos_token=True),
    ModelOptions(think_end_token=4),
)


@pytest.fixture(scope="module")
def bos(tmp_path_factory):
    """A model of random weights, and a tokenizer that begins texts with a token."""
    from tests.architectures import ARCHITECTURES
    from tests.conftest import save_tokenizer

    folder = tmp_path_factory.mktemp("bos")
    ARCHITECTURES["llama"]().save_pretrained(folder)
    save_tokenizer(folder, adds_bos=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Candidate(model, AutoTokenizer.from_pretrained(folder), {})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_are_those_of_the_model_in_memory(bos, healthy, options):
    here = ResidentLM(bos.model, bos.text_tokenizer, 4, options)
    pairs = [("abc", "de"), ("abc", "def"), ("~abc", "g"), ("", "hello"), ("ab ", "cd")]
    long = "abcdefghij" * 30
    likelihoods = requests_of("loglikelihood", *pairs)
    rolling = requests_of("loglikelihood_rolling", ("abcdef",), ("~hgf",))
    settings = {"until": ["e", "."], "max_gen_toks": 8}
    written = requests_of(
        "generate_until",
        ("abc", settings),
        ("hgfed", {"until": "a", "do_sample": False, "max_gen_toks": 5}),
        (long, settings),
    )
    with healthy.load(bos, 4, options) as there, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (ours, greedy), (theirs, their_greedy) in zip(
            there.loglikelihood(likelihoods, disable_tqdm=True),
            here.loglikelihood(likelihoods, disable_tqdm=True),
            strict=True,
        ):
            assert ours == pytest.approx(theirs, abs=1e-4) and greedy == their_greedy
        assert there.loglikelihood_rolling(rolling) == pytest.approx(
            here.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-4
        )
        texts = there.generate_until(written)
        assert texts == here.generate_until(written)
    assert len(set(texts)) > 1


def test_long_requests_are_cut_as_in_the_harness(bos, healthy):
    text = "abcdefgh" * 40
    with healthy.load(bos, 4) as model:
        length = model.max_length
        asked = requests_of("loglikelihood", (text, "hg"), ("ab", text))
        asked += requests_of("loglikelihood", (text[-length + 3 :], "hg"))
        long, longer, same = model.loglikelihood(asked, disable_tqdm=True)
        (rolled,) = model.loglikelihood_rolling(
            requests_of("loglikelihood_rolling", (text,))
        )
    # One token fewer than the engine reads, for the one that vLLM writes.
    assert long == same
    assert longer[0] < 0 and rolled < longer[0]


def test_a_setting_that_the_engine_does_not_know(bos, healthy):
    asked = requests_of("generate_until", ("abc", {"max_gen_toks": 3, "num_beams": 3}))
    with (
        healthy.load(bos, 4) as model,
        pytest.raises(EvaluationError, match=r"refused `generate`: .*num_beams"),
    ):
        model.generate_until(asked)
    with healthy.load(bos, 4) as model:
        few = requests_of("generate_until", ("abc", {"max_gen_toks": 3}))
        assert model.generate_until(few)
        many = requests_of("generate_until", ("abc", {"max_gen_toks": 9999}))
        with pytest.raises(EvaluationError, match="max_gen_toks must be below the"):
            model.generate_until(many)


@pytest.mark.parametrize("kind", ["stale", "half"])
def test_weights_that_were_not_replaced_are_noticed(
    specialists, models, expected, broken, kind
):
    backend = broken(kind)
    evaluator = harness(specialists, *SCORES, backend=backend)
    for name in NAMES:
        scores = evaluator.evaluate(models[name], "search")
        assert per_example(scores) == per_example(expected[name])
    assert backend.n_starts == 2


def test_stale_weights_are_noticed_though_the_candidates_are_alike(models, broken):
    """Their difference is below the tolerance."""
    backend = broken("stale", tolerance=100.0)
    for name in ("scribe", "mirror", "scribe"):
        with backend.load(replace(models[name]), 4):
            pass
    assert backend.n_starts == 3


def test_an_engine_that_computes_something_else_fails_the_trial(models, broken):
    backend = broken("wrong")
    message = "differ from those in transformers by .* nats a token, although vLLM was"
    with (
        pytest.raises(EvaluationError, match=message),
        backend.load(models["scribe"], 4),
    ):
        pass


@pytest.mark.parametrize("method", ["start", "replace", "log_likelihoods"])
def test_a_process_that_dies_is_started_for_the_next_candidate(
    specialists, models, expected, broken, method
):
    backend = broken("die", method, once=True)
    evaluator = harness(specialists, *SCORES, backend=backend)
    failures = 0
    for name in ("scribe", "mirror", "scribe"):
        try:
            scores = evaluator.evaluate(replace(models[name]), "search")
        except EvaluationError as error:
            assert f"ended during `{method}` (SIGKILL" in str(error)
            failures += 1
        else:
            assert per_example(scores) == per_example(expected[name])
    # A swap that fails is repeated with a new engine.
    assert failures == (0 if method == "replace" else 1)


def test_a_process_that_is_killed_between_two_candidates(
    specialists, models, expected, broken
):
    backend = broken("none")
    evaluator = harness(specialists, *SCORES, backend=backend)
    evaluator.evaluate(models["scribe"], "search")
    os.kill(backend._worker.pid, signal.SIGKILL)
    scores = evaluator.evaluate(models["mirror"], "search")
    assert per_example(scores) == per_example(expected["mirror"])
    assert backend.n_starts == 2


def test_a_process_that_hangs_ends_with_the_time_limit(specialists, models, broken):
    backend = broken("hang", "log_likelihoods", once=True)
    evaluator = harness(specialists, *SCORES, backend=backend)
    with (
        pytest.raises(EvaluationError, match=r"longer than 0\.5 s"),
        enforce_time_limit(0.5),
    ):
        # The start is not counted, and takes longer.
        evaluator.evaluate(models["scribe"], "search")
    assert backend.n_starts == 1 and not backend._worker.is_running
    assert evaluator.evaluate(models["scribe"], "search")


def test_the_clock_of_a_limit_can_stand():
    with enforce_time_limit(0.3):
        with suspended_time_limit():
            signal.sigtimedwait([], 0.5)
        assert 0.1 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
    with suspended_time_limit():
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_candidates_of_another_shape_get_an_engine_of_their_own(bos, models, healthy):
    starts = healthy.n_starts
    for candidate in (bos, models["scribe"]):
        with healthy.load(replace(candidate), 4):
            pass
    assert healthy.n_starts > starts


def test_nan_is_a_failed_trial(models, healthy):
    model = AutoModelForCausalLM.from_pretrained(models["scribe"].model.name_or_path)
    model.eval().model.norm.weight.data.fill_(float("nan"))
    bad = Candidate(model, models["scribe"].tokenizer, {})
    with pytest.raises(EvaluationError, match="logits are NaN"), healthy.load(bad, 4):
        pass
    with healthy.load(replace(models["scribe"]), 4) as good:
        assert good.max_length


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({}, {"python": "/nowhere"}, "cannot run /nowhere: .*python3 -m venv"),
        ({}, {"python": "/bin/cat"}, "/bin/cat cannot run vLLM: .*python3 -m venv"),
        ({}, {"python": "/bin/true"}, r"cannot run vLLM: .*\(exit status 0\)"),
        ({"max_modle_len": 9}, {"script": FILE}, "did you mean 'max_model_len'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_trial(
    arguments, options, message
):
    backend = VLLMBackend(arguments, **options)
    with pytest.raises(EvaluationError, match=message):
        backend.check(ModelKind("LlamaForCausalLM"), "gsm8k")
    backend.close()


def test_models_with_an_encoder_are_refused():
    kind = ModelKind("T5ForConditionalGeneration", is_encoder_decoder=True)
    with pytest.raises(EvaluationError, match="gsm8k: needs a model that is a decoder"):
        VLLMBackend().check(kind, "gsm8k")


def test_the_present_interpreter_without_vllm():
    """This environment has none, as most of paretomerge's have."""
    message = r"cannot run vLLM: .*No module named 'vllm'.*set `python: vllm-env"
    with pytest.raises(EvaluationError, match=message):
        VLLMBackend().check(ModelKind("LlamaForCausalLM"), "gsm8k")


def study_of(specialists, tmp_path, **evaluation):
    models = [str(specialists / "models" / name) for name in NAMES]
    return pm.Study(
        base=str(specialists / "models" / "base"),
        models=models,
        objectives=[pm.Task("reverse"), pm.Task("translate")],
        evaluation=pm.Evaluation(
            include_path=str(specialists / "tasks"),
            data_root=str(specialists),
            splits={"search": "search", "held_out": "held_out"},
            search_items=40,
            held_out_items=20,
            **evaluation,
        ),
        sampler="random",
        dtype="float32",
        out=str(tmp_path / "run"),
    )


def test_a_study_refuses_before_its_first_trial(specialists, tmp_path):
    study = study_of(
        specialists, tmp_path, backend={"name": "vllm", "python": "/nowhere"}
    )
    with pytest.raises(EvaluationError, match="cannot run /nowhere"):
        study.optimize(n_trials=1, show_progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("race", [None, 0.8])
def test_a_study_with_one_engine(specialists, tmp_path, monkeypatch, race):
    """Search and held-out scores, with and without races, go through one process."""
    monkeypatch.setattr("paretomerge.evaluate.vllm.backend.WORKER", FILE)
    here = study_of(specialists, tmp_path / "here", race=race)
    options = {"name": "vllm", "python": sys.executable}
    there = study_of(specialists, tmp_path / "there", backend=options, race=race)
    for study in (here, there):
        study.optimize(n_trials=8, show_progress_bar=False)
    for ours, theirs in zip(there.results().trials, here.results().trials, strict=True):
        assert not ours.failure and ours.final == theirs.final
        assert per_example(ours.scores) == per_example(theirs.scores)
    backend = there._search.goals.evaluator.evaluators[0]._backend
    assert backend.n_starts == 1 and backend.n_swaps >= 7
    backend.close()


def test_options_are_checked_with_the_other_settings():
    for option, value, message in (
        ("timeout", 0, r"evaluate\.backend\.timeout: must be above 0"),
        ("tolerance", "big", r"evaluate\.backend\.tolerance: "),
        ("python", 3, r"evaluate\.backend\.python: "),
    ):
        with pytest.raises(ConfigError, match=message):
            pm.Evaluation(backend={"name": "vllm", option: value})


def test_scores_in_a_cache_belong_to_their_engine():
    keys = {
        VLLMBackend().key,
        VLLMBackend({"dtype": "bfloat16"}).key,
        pm_backend("hf").key,
    }
    assert len(keys) == 3
    assert VLLMBackend(python="/elsewhere").key == VLLMBackend().key


def pm_backend(name):
    from paretomerge.evaluate.backend import Backend

    return Backend(name)
