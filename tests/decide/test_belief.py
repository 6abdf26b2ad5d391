"""What is believed of noisy trials, against samples of the model and against brute force."""

from dataclasses import replace

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from scipy.stats import multivariate_normal

from paretomerge.decide.belief import Belief, Noise
from paretomerge.decide.decision import best_chances, decide
from paretomerge.decide.refinement import refinements
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.pareto.preference import Preference
from paretomerge.record.results import Parameters, Results
from paretomerge.record.trial import Trial

SPACE = {0: Parameters({"x": FloatDistribution(0, 1)})}


def truth(x: np.ndarray) -> np.ndarray:
    return 0.7 - 0.8 * (x - 0.6) ** 2


def quiz(
    n: int, n_examples: int, seed: int, scores: str = "scores"
) -> tuple[Results, np.ndarray]:
    """Trials that answer the same questions, some of them easy; and their true scores."""
    rng = np.random.default_rng(seed)
    x = rng.random(n)
    easiness = rng.uniform(-0.3, 0.3, n_examples)
    trials = []
    for number in range(n):
        chance = truth(x[number]) + easiness
        right = (rng.random(n_examples) < chance).astype(float)
        score = {"quiz": Score.mean_of(right)}
        trials.append(Trial(number, {"x": x[number]}, **{scores: score}))
    return Results((Objective("quiz"),), (), tuple(trials), parameters=SPACE), truth(x)


def test_beliefs_are_nearer_to_the_truth_than_scores() -> None:
    of_belief, of_scores = [], []
    for seed in range(8):
        results, true_scores = quiz(40, 60, seed)
        belief = Belief.of(results)
        scores = np.array([trial.scores["quiz"].value for trial in results.trials])
        # Differences between trials are what a pick depends on.
        for errors, values in ((of_belief, belief.mean[:, 0]), (of_scores, scores)):
            error = values - true_scores
            errors.append(np.std(error))
    assert np.mean(of_belief) < 0.6 * np.mean(of_scores)


def test_intervals_hold_what_they_promise() -> None:
    inside = []
    for seed in range(30):
        results, true_scores = quiz(30, 50, seed)
        decision = decide(results, Preference.mean(1), Belief.of(results))
        expected = decision.expected["quiz"]
        true_score = true_scores[decision.trial.number]
        inside.append(expected.low <= true_score <= expected.high)
    # 27 of 30 are expected; fewer than 23 have a probability of 1 %.
    assert sum(inside) >= 23


def test_the_noise_that_all_trials_share_is_told_from_their_own() -> None:
    rng = np.random.default_rng(0)
    easiness = rng.normal(0, 2, 4000)
    rows = [Score.mean_of(easiness + rng.normal(0, 1, 4000)) for _ in range(8)]
    noise = Noise.of(rows)
    assert noise.common == pytest.approx(4, rel=0.1)
    assert noise.residual == pytest.approx(np.ones(8), rel=0.15)
    # 100 examples of one trial, and the first 25 of them of another.
    expected = [[(4 + 1) / 100, 4 / 100], [4 / 100, (4 + 1) / 25 - 4 / 25 + 4 / 25]]
    covariance = noise.of_means([0, 1], [100, 25])
    assert covariance == pytest.approx(np.array(expected), rel=0.15)


def test_new_scores_change_a_belief_as_conditioning_does() -> None:
    rng = np.random.default_rng(1)
    root = rng.normal(size=(3, 3))
    covariance = root @ root.T
    trials = tuple(Trial(i, {}, {"a": Score(0.0)}) for i in range(3))
    none = Noise(0.0, np.zeros(3), np.zeros(3), 0.0)
    belief = Belief(trials, np.zeros((3, 1)), covariance[None], (none,))
    noise = np.array([[0.5, 0.2], [0.2, 0.4]])
    y = np.array([1.0, -0.5])
    updated = belief._given(0, [0, 2], y, noise)
    # By brute force: weights of samples of the prior.
    samples = rng.multivariate_normal(np.zeros(3), covariance, 400_000)
    weights = multivariate_normal(cov=noise).pdf(y - samples[:, [0, 2]])
    weights /= weights.sum()
    mean = weights @ samples
    assert updated.mean[:, 0] == pytest.approx(mean, abs=0.02)
    spread = (weights[:, None] * (samples - mean)).T @ (samples - mean)
    assert updated.covariance[0] == pytest.approx(spread, abs=0.03)


def test_exact_scores_are_believed() -> None:
    trials = []
    for number, x in enumerate(np.linspace(0, 1, 9)):
        scores = {"a": Score(float(np.sin(9 * x)))}
        trials.append(Trial(number, {"x": x}, scores))
    results = Results((Objective("a"),), (), tuple(trials), parameters=SPACE)
    belief = Belief.of(results)
    expected = [trial.scores["a"].value for trial in trials]
    assert belief.mean[:, 0] == pytest.approx(expected, abs=1e-3)
    decision = decide(results, Preference.mean(1), belief)
    assert decision.trial.number == int(np.argmax(expected))
    assert decision.probability > 0.99


def test_few_trials_are_taken_at_their_word() -> None:
    results, _ = quiz(3, 50, 0)
    belief = Belief.of(results)
    scores = [trial.scores["quiz"].value for trial in results.trials]
    assert belief.mean[:, 0] == pytest.approx(scores, abs=1e-2)


def test_failed_infeasible_and_repeated_trials_are_no_candidates() -> None:
    score = {"a": Score(0.5, 0.1, 10)}
    trials = (
        Trial(0, {"x": 0.1}, score),
        Trial(1, {"x": 0.2}, failure="no"),
        Trial(2, {"x": 0.3}, score, constraints={"size": 1.0}),
        Trial(3, {"x": 0.1}, score, same_as=0),
        Trial(4, {"x": 0.4}, score, final=False),
        Trial(5, {"x": 0.5}, score),
    )
    results = Results((Objective("a"),), (), trials, parameters=SPACE)
    assert [trial.number for trial in Belief.of(results).trials] == [0, 5]


def test_selection_examples_decide() -> None:
    results, _ = quiz(20, 30, 3)
    belief = Belief.of(results)
    loser = int(belief.mean[:, 0].argmin())
    trials = list(results.trials)
    right = {"quiz": Score.mean_of([1.0] * 390 + [0.0] * 10)}
    changed = Trial(loser, trials[loser].params, trials[loser].scores, selection=right)
    trials[loser] = changed
    after = Results(results.objectives, (), tuple(trials), parameters=SPACE)
    assert decide(after, Preference.mean(1), Belief.of(after)).trial.number == loser


def test_scores_without_examples_have_held_out_noise():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        x = rng.random(20)
        trials = []
        for number in range(20):
            measured = truth(x[number]) + 0.05 * rng.standard_normal()
            trials.append(
                Trial(number, {"x": x[number]}, {"a": Score(measured, 0.05, 50)})
            )
        results = Results((Objective("a"),), (), tuple(trials), parameters=SPACE)
        decision = decide(results, Preference.mean(1), Belief.of(results))
        # As many held-out examples as search examples: the same noise.
        held_out = truth(x[decision.trial.number]) + 0.05 * rng.standard_normal()
        expected = decision.expected["a"]
        inside.append(expected.low <= held_out <= expected.high)
    # 54 of 60 are expected; fewer than 48 have a probability of 1 %.
    assert sum(inside) >= 48


def test_the_knee_of_one_objective_is_its_best() -> None:
    trials = tuple(Trial(i, {}, {"a": Score(0.5)}) for i in range(2))
    none = Noise(0.0, np.zeros(2), np.zeros(2), 0.0)
    covariance = np.diag([0.05**2, 0.005**2])
    belief = Belief(trials, np.array([[0.8], [0.79]]), covariance[None], (none,))
    results = Results((Objective("a"),), (), trials)
    decision = decide(results, Preference.knee(1), belief)
    assert decision.trial.number == 0
    # Phi(0.01 / sqrt(0.05^2 + 0.005^2)) = 0.579
    assert decision.probability == pytest.approx(0.579, abs=0.03)


def test_minimised_objectives_come_out_in_the_users_direction() -> None:
    trials = []
    for number, x in enumerate(np.linspace(0, 1, 9)):
        trials.append(Trial(number, {"x": x}, {"loss": Score(1 + x, 0.05, 20)}))
    results = Results((Objective("loss", False),), (), tuple(trials), parameters=SPACE)
    decision = decide(results, Preference.knee(1), Belief.of(results))
    assert decision.trial.number == 0
    expected = decision.expected["loss"]
    assert expected.low < expected.value < expected.high
    assert expected.value == pytest.approx(1, abs=0.1)
    assert decision.change["loss"] > 0


def test_the_chance_of_being_the_best() -> None:
    values = np.array([[1.0, 0.0], [1.0, 2.0], [3.0, 0.0], [1.0, 0.0]])
    assert best_chances(values).tolist() == [0.75, 0.25]


def test_what_was_believed_of_new_trials_does_not_know_their_scores() -> None:
    results, true_scores = quiz(24, 400, 5)
    found = refinements(results, 20)
    assert [entry.trial.number for entry in found] == [20, 21, 22, 23]
    trials = list(results.trials)
    lucky = {"quiz": Score.mean_of([1.0] * 400)}
    trials[23] = Trial(23, trials[23].params, lucky)
    again = refinements(
        Results(results.objectives, (), tuple(trials), parameters=SPACE), 20
    )
    believed = again[3].believed["quiz"]
    assert believed.value == pytest.approx(true_scores[23], abs=0.08)
    assert believed.high < 0.9


def test_a_long_study_is_believed_from_all_of_its_trials(monkeypatch) -> None:
    """Whatever is left out of the fit and of the draws, the pick and its score stay."""
    results, _ = quiz(120, 60, 4)
    whole = decide(results, Preference.mean(1), Belief.of(results))
    monkeypatch.setattr("paretomerge.decide.belief._MOST_FITTED", 60)
    monkeypatch.setattr("paretomerge.decide.belief._MOST_DRAWN", 40)
    belief = Belief.of(results)
    assert len(belief.trials) == 40 and belief.draws.shape[1] == 40
    part = decide(results, Preference.mean(1), belief)
    assert part.trial == whole.trial
    assert part.expected["quiz"].value == pytest.approx(
        whole.expected["quiz"].value, abs=0.01
    )
    monkeypatch.setattr("paretomerge.decide.belief._MOST_DATA", 50)
    fewer = decide(results, Preference.mean(1), Belief.of(results))
    assert fewer.trial == whole.trial


def test_hidden_and_selected_trials_stay_in_the_belief_of_a_long_study(monkeypatch):
    results, _ = quiz(60, 30, 5)
    for limit in ("_MOST_DATA", "_MOST_DRAWN"):
        monkeypatch.setattr(f"paretomerge.decide.belief.{limit}", 10)
    scores = [trial.scores["quiz"].value for trial in results.trials]
    worst, second = np.argsort(scores)[:2].tolist()
    trials = list(results.trials)
    trials[second] = replace(trials[second], selection=trials[second].scores)
    results = replace(results, trials=tuple(trials))
    belief = Belief.of_search(results, hidden={worst})
    numbers = {trial.number for trial in belief.trials}
    assert {worst, second} <= numbers and len(numbers) <= 12
