"""Every method on a space with a formula for accuracy: the contract of `propose`, and the decisions of mfkd."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import FRONT_METHODS, Plan
from engine.search.methods import propose as propose_module
from engine.search.methods.estimate import SurrogateInputs, candidate_features, estimate, learned_weights
from engine.search.methods.hypervolume import front_so_far
from engine.search.methods.mfkd import mfkd
from engine.search.methods.propose import (
    ABLATIONS,
    METHODS,
    USE_TRENDS,
    find_method,
    is_installed,
    lacks,
    propose,
    winner,
)
from engine.search.methods.recommend import noise_variance, posterior
from engine.search.methods.scores import SHORTLIST, IdentityKey, find_rows, scores, worker_count
from engine.space import Candidates
from engine.trial import Architecture, EnvironmentUnusable, Evaluation, Fidelity, History, Trial, UsageError
from surrogate.linear import Linear
from surrogate.quality import ranks as rankdata
from surrogate.xgb import BOTH, SurrogateParts

LOW, OTHER, FULL = Fidelity("low", epochs=1), Fidelity("other", epochs=1), Fidelity("full", epochs=20)


def space(side=4, d=5):
    """side ** d architectures of ordinal choices; MACs grow with the first choices."""
    choices = np.indices((side,) * d).reshape(d, -1).T.astype(np.int8)
    macs = 1e6 * (1.0 + choices[:, : d // 2 + 1].sum(axis=1))
    return Candidates(choices, (choices / (side - 1)).astype(np.float32), macs, macs / 10)


SPACE = space()


def truth(architecture):
    """Accuracy 0..1. It depends on choices that do not affect MACs too, and the last two interact."""
    c = np.array(architecture.choices) / 3
    return float(0.2 + 0.1 * c[:3].sum() + 0.15 * c[3] + 0.2 * (c[3] > 0.5) * (c[4] < 0.4))


def answer(trial, luck=0.0):
    noise = np.random.default_rng(int(trial.key, 16)).standard_normal()
    low = trial.fidelity != FULL
    accuracy = truth(trial.architecture) * (0.6 if low else 1.0) + (0.03 if low else luck) * noise
    return Evaluation(trial, "ok", accuracy, seconds=1.0 if low else 20.0)


def broken(trial):
    """Like `answer`, but every third trial fails."""
    fails = trial.number % 3 == 0
    return Evaluation(trial, "diverged", seconds=1.0, error="nan") if fails else answer(trial)


def run(plan, slots=4, space=SPACE, answer=answer, method=None):
    """Evaluates every trial at once, `slots` at a time."""
    history = History()
    while trials := (method or propose)(space, history, plan, slots):
        assert [t.number for t in trials] == list(range(history.asked, history.asked + len(trials)))
        assert len(trials) <= slots
        history.answered.extend(answer(t) for t in trials)
    return history


def full(history):
    return [e for e in history.answered if e.trial.fidelity == FULL]


def with_trends(unknown=0.3, **trends):
    """The space with these columns, a share of whose values is unknown."""
    rng = np.random.default_rng(7)
    columns = {f"proxy:{name}": np.where(rng.random(len(SPACE)) < unknown, np.nan, v) for name, v in trends.items()}
    return replace(SPACE, trends=columns)


TRUTH = np.array([truth(SPACE.architecture(row)) for row in range(len(SPACE))])
GOOD = TRUTH + 0.05 * np.random.default_rng(1).standard_normal(len(SPACE))
NOISE = np.random.default_rng(2).standard_normal(len(SPACE))
SCORED = with_trends(naswot=GOOD, noise=NOISE)
EVERY = pytest.mark.parametrize(
    ("method", "space"),
    [
        pytest.param(name, SPACE, id=name, marks=pytest.mark.skipif(not is_installed(name), reason="no Optuna"))
        for name in (*METHODS, *ABLATIONS)
        if not lacks(name, ("low",), ())
    ]
    + [pytest.param(name, SCORED, id=f"{name} with scores") for name in USE_TRENDS],
)


@EVERY
def test_every_method_respects_the_plan_and_asks_nothing_twice(method, space):
    history = run(Plan((LOW,), FULL, method, max_low=20, max_high=7), space=space)
    asked = [(e.trial.architecture, e.trial.fidelity, e.trial.seed) for e in history.answered]
    assert len(set(asked)) == len(asked)
    assert len(full(history)) == 7
    assert len(asked) - 7 <= 20


@EVERY
def test_every_method_is_a_pure_function(method, space):
    plan = Plan((LOW,), FULL, method, max_low=12, max_high=6, seed=3)
    whole = run(plan, space=space)
    for cut in (0, 5, 12, 15):
        seen = History(whole.answered[:cut], [e.trial for e in whole.answered[cut : cut + 2]])
        before = (list(seen.answered), list(seen.pending))
        first = propose(space, seen, plan, 3)
        assert propose(space, seen, plan, 3) == first
        assert (seen.answered, seen.pending) == before


@EVERY
def test_every_method_survives_failures_and_does_not_repeat_them(method, space):
    history = run(Plan((LOW,), FULL, method, max_low=12, max_high=9), space=space, answer=broken)
    asked = [(e.trial.architecture, e.trial.fidelity, e.trial.seed) for e in history.answered]
    assert len(set(asked)) == len(asked)
    assert winner(space, history, Plan((LOW,), FULL, method)) is not None


@EVERY
def test_every_method_survives_a_space_of_two_and_all_failing(method, space):
    tiny = space.where(np.arange(len(space)) < 2)
    fail = lambda trial: Evaluation(trial, "oom", error="too big")  # noqa: E731
    history = run(Plan((LOW,), FULL, method), space=tiny, answer=fail)
    assert len(history.answered) <= 4
    assert winner(tiny, history, Plan((LOW,), FULL)) is None


@EVERY
def test_pending_trials_count_as_asked(method, space):
    plan = Plan((LOW,), FULL, method, max_low=16, max_high=6)
    seen = History(run(plan, space=space).answered[:14])
    for _ in range(4):
        seen.pending.extend(propose(space, seen, plan, 1))
    asked = [(t.architecture, t.fidelity) for t in [e.trial for e in seen.answered] + seen.pending]
    assert len(set(asked)) == len(asked)


def test_unknown_method_names_the_methods():
    with pytest.raises(UsageError, match="no method named 'magic'; choose from mfkd, "):
        propose(SPACE, History(), Plan((LOW,), FULL, "magic"), 1)


def test_mfkd_is_better_than_random_with_the_same_number_of_full_trials():
    def regret(method):
        best = max(map(truth, (SPACE.architecture(i) for i in range(len(SPACE)))))
        plans = [Plan((LOW,), FULL, method, max_low=24, max_high=6, seed=s) for s in range(5)]
        return np.mean([best - truth(winner(SPACE, run(p), p).trial.architecture) for p in plans])

    assert regret("mfkd") < 0.5 * regret("random")


def test_the_first_batch_is_spread_over_macs():
    plan = Plan((LOW,), FULL, max_low=20, max_high=5)
    first = propose(SPACE, History(), plan, 10)
    macs = np.sort([SPACE.macs[find_rows(SPACE, [t.architecture])[0]] for t in first])
    assert all(t.fidelity == LOW for t in first)
    assert macs[0] <= np.quantile(SPACE.macs, 0.2)
    assert macs[-1] >= np.quantile(SPACE.macs, 0.8)


def test_a_plan_with_many_low_trials_per_full_one_makes_them_first():
    history = run(Plan((LOW,), FULL, max_low=24, max_high=6))
    kinds = [e.trial.fidelity.name for e in history.answered]
    assert kinds == ["low"] * 24 + ["full"] * 6


def test_a_space_smaller_than_the_low_budget_gets_all_its_low_scores_before_full_trials():
    history = run(Plan((LOW,), FULL, max_low=50, max_high=10), space=space(side=2))
    kinds = [e.trial.fidelity.name for e in history.answered]
    assert kinds == ["low"] * 32 + ["full"] * 10


def test_cheaper_low_trials_are_asked_more_often():
    def lows(epochs):
        plan = Plan((Fidelity("low", epochs=epochs),), Fidelity("full", epochs=20), max_low=200, max_high=60)
        measure = lambda t: Evaluation(t, "ok", answer(t).accuracy, seconds=float(t.fidelity.epochs))  # noqa: E731
        history = History()
        while len([e for e in history.answered if e.trial.fidelity == plan.high]) < 4:
            history.answered.extend(map(measure, propose(SPACE, history, plan, 2)))
        return sum(e.trial.fidelity == plan.lows[0] for e in history.answered)

    assert lows(1) > lows(16)


def test_a_low_fidelity_of_noise_is_dropped_and_the_log_says_so(caplog):
    def random_low(trial):
        noise = np.random.default_rng(int(trial.key, 16)).random()
        return answer(trial) if trial.fidelity == FULL else Evaluation(trial, "ok", noise, seconds=1.0)

    history = History()
    rows = np.random.default_rng(0).permutation(len(SPACE))
    for fidelity, some in ((LOW, rows[:90]), (FULL, rows[90:150])):
        trials = [Trial(history.asked + i, SPACE.architecture(r), fidelity) for i, r in enumerate(some)]
        history.answered.extend(map(random_low, trials))
    with caplog.at_level("INFO", logger="engine.search.methods.estimate"):
        propose(SPACE, history, Plan((LOW,), FULL, max_low=100, max_high=80, seed=11), 1)
    assert "low fidelity 0 carries no signal" in caplog.text


def test_of_two_low_fidelities_the_useless_one_is_dropped_and_the_other_kept():
    """In most of five draws: now and then noise fits by luck, and then leaving it out predicts no better."""

    def one_is_noise(trial):
        noise = np.random.default_rng(int(trial.key, 16)).random()
        return Evaluation(trial, "ok", noise, seconds=1.0) if trial.fidelity == LOW else answer(trial)

    dropped = []
    for draw in range(1, 6):
        history, rows = History(), np.random.default_rng(draw).permutation(len(SPACE))
        for fidelity, some in ((LOW, rows[:60]), (OTHER, rows[:60]), (FULL, rows[60:120])):
            trials = [Trial(history.asked + i, SPACE.architecture(r), fidelity) for i, r in enumerate(some)]
            history.answered.extend(map(one_is_noise, trials))
        lows = [scores(SPACE, history, low) for low in (LOW, OTHER)]
        known = estimate(SPACE, lows, scores(SPACE, history, FULL), 0, SurrogateInputs())
        assert len(known.levels) == len(known.slopes) == 2 - len(known.dropped)
        dropped.append(known.dropped)
    assert all(some in ([], [0]) for some in dropped)
    assert dropped.count([0]) >= 3


def poor(trial):
    """Low scores that say little."""
    noise = np.random.default_rng(int(trial.key, 16)).standard_normal()
    weak = Evaluation(trial, "ok", 0.5 + 0.1 * truth(trial.architecture) + 0.05 * noise, seconds=1.0)
    return weak if trial.fidelity == LOW else answer(trial)


def some_results(space, parts=BOTH):
    """The estimate from random low and full results."""
    history, rows = History(), np.random.default_rng(5).permutation(len(space))
    for fidelity, some in ((LOW, rows[:24]), (FULL, rows[24:54])):
        trials = [Trial(history.asked + i, space.architecture(r), fidelity) for i, r in enumerate(some)]
        history.answered.extend(map(poor, trials))
    return estimate(space, [scores(space, history, LOW)], scores(space, history, FULL), 0, SurrogateInputs(parts=parts))


def test_without_further_trends_nothing_is_decided_otherwise():
    plan = Plan((LOW,), FULL, max_low=20, max_high=12)
    plain = [e.trial for e in run(plan).answered]
    ablated = [e.trial for e in run(replace(plan, method="mfkd:no-trends"), space=SCORED).answered]
    constant = [e.trial for e in run(plan, space=with_trends(0.0, same=np.ones(len(SPACE)))).answered]
    unknown = [e.trial for e in run(plan, space=with_trends(1.0, none=GOOD)).answered]
    assert plain == constant == unknown == ablated
    assert plain != [e.trial for e in run(plan, space=SCORED).answered]


def test_a_run_learns_which_trends_to_trust():
    fitted = some_results(with_trends(0.0, naswot=GOOD, noise=NOISE))
    weights = {weight.name: weight for weight in learned_weights(fitted, ["low"])}
    assert list(weights) == ["macs", "proxy:naswot", "proxy:noise", "low"]
    good, noise = weights["proxy:naswot"], weights["proxy:noise"]
    assert good.included > 0.9
    assert good.mean > 1.5 * good.std
    assert abs(noise.mean) < min(0.1, 2 * noise.std)
    assert noise.included < good.included
    assert weights["macs"].included == weights["low"].included == 1


def test_the_sign_of_a_trend_of_unknown_direction_does_not_matter():
    linear = SurrogateParts(trees=False)
    one, other = (some_results(replace(SPACE, trends={"latency:it": sign * GOOD}), linear) for sign in (1, -1))
    turned = np.where(np.arange(len(one.linear.weights)) == 2, -1, 1)  # after intercept and MACs
    np.testing.assert_allclose(one.linear.weights, turned * other.linear.weights, atol=1e-6)


def test_training_free_scores_count_before_there_are_results_and_can_be_proved_wrong():
    def guess(space):
        none = scores(space, History(), FULL)
        return estimate(space, [scores(space, History(), LOW)], none, 0, SurrogateInputs()).mean

    right, wrong = (with_trends(0.0, it=sign * GOOD) for sign in (1, -1))
    np.testing.assert_allclose(guess(right) - guess(SPACE), guess(SPACE) - guess(wrong), atol=1e-6)
    assert np.corrcoef(guess(right) - guess(SPACE), GOOD)[0, 1] > 0.9
    np.testing.assert_allclose(guess(replace(SPACE, trends={"latency:it": GOOD})), guess(SPACE), atol=1e-6)
    known = some_results(wrong)
    assert {weight.name: weight.mean for weight in learned_weights(known, ["low"])}["proxy:it"] < -0.1
    assert np.corrcoef(known.mean, some_results(right).mean)[0, 1] > 0.7


def test_the_more_full_trials_are_to_follow_the_more_low_ones_are_worth_their_time():
    def lows(full_trials):
        plans = [Plan((LOW,), FULL, max_low=60, max_high=full_trials, seed=s) for s in range(4)]
        return sum(e.trial.fidelity == LOW for plan in plans for e in run(plan).answered)

    assert lows(40) > lows(20) > 4 * 24  # the first batch alone


def test_an_unknown_value_is_predicted_from_the_others_and_less_certain():
    half = with_trends(0.5, it=GOOD)
    features, known = candidate_features(IdentityKey(half)), np.isfinite(half.trends["proxy:it"])
    whole = candidate_features(IdentityKey(with_trends(0.0, it=GOOD)))
    assert (features.trend_variance[1][known] == 0).all()
    assert (features.trend_variance[1][~known] > 0).all()
    assert np.corrcoef(features.trends[~known, 1], whole.trends[~known, 1])[0, 1] > 0.8
    assert features.trends[~known, 1].std() < whole.trends[~known, 1].std()  # shrunk
    fitted = some_results(half)
    assert fitted.variance[~known].mean() > fitted.variance[known].mean()


def test_a_score_that_knows_what_the_encoding_cannot_finds_better_architectures():
    """The mean of what is trained in full after the first few results."""
    hidden = np.random.default_rng(3).standard_normal(len(SPACE))

    def with_hidden(trial):
        told = 0.06 * hidden[SPACE.row(trial.architecture)] * (trial.fidelity == FULL)
        return replace(poor(trial), accuracy=poor(trial).accuracy + told)

    def later(space):
        plans = [Plan((LOW,), FULL, max_low=8, max_high=16, seed=s) for s in range(5)]
        return np.mean([e.accuracy for p in plans for e in full(run(p, space=space, answer=with_hidden))[8:]])

    assert later(with_trends(0.0, it=hidden)) > later(SPACE) + 0.02


def test_proxies_train_what_all_scores_rank_highest_and_naswot_what_its_own_does():
    space = with_trends(0.0, naswot=GOOD, other=TRUTH)
    plan = Plan((LOW,), FULL, "naswot", max_high=5)
    assert {e.trial.architecture for e in full(run(plan, space=space))} == set(
        map(space.architecture, np.argsort(-GOOD)[:5])
    )
    together = np.log(rankdata(GOOD)) + np.log(rankdata(TRUTH))
    asked = [e.trial.architecture for e in full(run(replace(plan, method="proxies"), space=space))]
    assert together[find_rows(space, asked)].tolist() == np.sort(together)[::-1][:5].tolist()


@pytest.mark.parametrize("method", ["proxies", "naswot"])
def test_methods_of_scores_alone_say_that_there_are_none(method):
    with pytest.raises(UsageError, match=f"--method {method} needs training-free scores"):
        propose(SPACE, History(), Plan((LOW,), FULL, method), 1)


def test_bore_asks_what_resembles_the_best_third():
    results = [e.accuracy for e in full(run(Plan((LOW,), FULL, "bore", max_high=40)))]
    assert np.mean(results[20:]) > np.mean(results[:8]) + 0.05


@pytest.mark.parametrize(("method", "ordered"), [("optuna-tpe", False), ("optuna-tpe", True), ("optuna-gp", True)])
def test_optuna_learns_from_the_history_under_a_cap(method, ordered):
    """Three quarters of what it may suggest are no candidates."""
    pytest.importorskip("optuna")
    inside = replace(SPACE.where(SPACE.macs <= np.quantile(SPACE.macs, 0.25)), ordinal=(ordered,) * 5)
    plan = Plan((LOW,), FULL, method, max_high=24)
    results = [e.accuracy for e in full(run(plan, space=inside))]
    assert np.mean(results[12:]) > np.mean(results[:8]) + 0.05


def test_optuna_gives_way_to_the_nearest_candidate():
    pytest.importorskip("optuna")
    from engine.search.methods.optuna_samplers import distances

    one = replace(SPACE, ordinal=(True, False, False, False, False))
    away = distances(one, [0, 1, 1, 1, 1])
    expected = {(0, 1, 1, 1, 1): 0, (1, 1, 1, 1, 1): 1 / 3, (3, 1, 1, 1, 1): 1, (0, 3, 1, 1, 2): 2}
    for choices, distance in expected.items():
        assert away[SPACE.row(Architecture(choices))] == pytest.approx(distance)


def test_a_method_without_its_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(propose_module, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentUnusable, match=r"optuna-tpe needs Optuna; run: pip install .*\[optuna\]"):
        find_method("optuna-tpe")


def test_a_full_trial_counts_as_a_whole_worker_and_a_low_one_as_its_share():
    low, high = (Trial(n, SPACE.architecture(n), fidelity) for n, fidelity in enumerate((LOW, FULL)))
    shared = Plan((LOW,), FULL, cohort=4)
    assert worker_count(Plan((LOW,), FULL), History([], [low, high]), free=1) == 3
    assert worker_count(shared, History([], [high]), free=4) == 2
    assert worker_count(shared, History([], [high, low, low]), free=2) == 2
    assert worker_count(shared, History([], [low]), free=1) == 1  # asked when the run had fewer slots


def test_gp_starts_with_one_random_full_trial_per_worker_not_per_slot():
    first = [Evaluation(Trial(0, SPACE.architecture(7), FULL), "ok", 0.5)]
    alone = propose(SPACE, History(first), Plan((LOW,), FULL, "gp"), 1)
    shared = propose(SPACE, History(first), Plan((LOW,), FULL, "gp", cohort=4), 4)
    assert alone[0] == shared[0]


def test_noisy_measurements_are_repeated_with_a_new_seed():
    plan = Plan((LOW,), FULL, max_low=12, max_high=40, seed=5)
    history = run(plan, slots=1, answer=lambda t: answer(t, luck=0.1))
    repeated = [e.trial for e in full(history) if e.trial.seed > 5]
    assert repeated
    for trial in repeated:
        earlier = [e.trial.seed for e in full(history) if e.trial.architecture == trial.architecture]
        assert sorted(earlier) == list(range(5, 5 + len(earlier)))


def test_winner_is_shrunk_towards_the_surrogate_and_is_never_a_low_fidelity_evaluation():
    plan = Plan((LOW,), FULL)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(SPACE))[:60]
    trials = [Trial(i, SPACE.architecture(r), FULL) for i, r in enumerate(rows)]
    exact = [Evaluation(t, "ok", truth(t.architecture)) for t in trials]
    order = sorted(exact, key=lambda e: e.accuracy)
    lucky, best = order[0], order[-1]  # the worst architecture gets an incredible score, just above the best
    answers = [Evaluation(e.trial, "ok", best.accuracy + 0.001) if e is lucky else e for e in exact]
    answers.append(Evaluation(Trial(60, SPACE.architecture(0), LOW), "ok", 0.99))
    chosen = winner(SPACE, History(answers), plan)
    assert chosen.trial.fidelity == FULL
    assert chosen.trial != lucky.trial
    assert chosen.accuracy >= order[-3].accuracy


@pytest.mark.parametrize(("noise", "weight"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.05 / 1.05)])
def test_a_measurement_is_weighted_by_how_little_noise_it_has(noise, weight):
    """The left-out prediction of it has variance 1, noise included."""
    fitted = Linear(np.zeros(2), np.eye(2), 0.3, np.array([0.0]), np.array([1.0]), np.ones(1))
    mean, variance = posterior(fitted, np.array([1.0]), np.array([1.0]), np.array([noise]))
    assert mean[0] == pytest.approx(weight)
    assert variance[0] == pytest.approx(weight * noise)


def test_noise_is_a_quarter_to_half_of_the_left_out_variance_by_image_count_until_repeats_measure_it():
    trials = [Trial(i, SPACE.architecture(i), FULL) for i in range(12)]
    history = History([answer(t) for t in trials])
    high = scores(SPACE, history, FULL)
    known = estimate(SPACE, [], high, 0, SurrogateInputs())
    quarter = 0.25 * known.linear.left_out_variance

    def noise(images, history=history, high=high):
        return noise_variance(history, Plan((LOW,), FULL, valid_images=images), high, known)

    assert noise(0) == pytest.approx(quarter)
    assert noise(1_000_000) == pytest.approx(quarter)
    assert noise(1) == pytest.approx(2 * quarter)
    of_one = high.values * (1 - high.values) * np.var(known.y) / np.var(high.values)
    images = int(of_one[0] / (1.5 * quarter[0]))  # such that the first architecture is between the two bounds
    assert quarter[0] < of_one[0] / images < 2 * quarter[0]
    assert noise(images)[0] == pytest.approx(of_one[0] / images)
    again = History([*history.answered, Evaluation(Trial(12, SPACE.architecture(0), FULL, 1), "ok", 0.9)])
    shown = np.var([history.answered[0].accuracy, 0.9], ddof=1) * np.var(known.y) / np.var(high.values)
    assert noise(10, again) == pytest.approx(np.full(12, shown))


def test_a_front_search_finds_cheap_architectures_that_a_search_for_accuracy_misses():
    def cheapest(cost):
        history = run(Plan((LOW,), FULL, max_low=24, max_high=16, cost=cost))
        return min(SPACE.macs[find_rows(SPACE, [e.trial.architecture])[0]] for e in full(history))

    assert cheapest("macs") < cheapest("")


# A cost that has nothing to do with MACs.
DEVICE = replace(SPACE, trends={"latency:device": np.random.default_rng(5).permutation(len(SPACE)) / len(SPACE)})


@pytest.mark.parametrize("opening", [None, Fidelity("inherited", epochs=0)], ids=["", "with an opening"])
def test_a_front_search_beats_random_search_at_every_budget(opening):
    budgets = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
    cost = DEVICE.cost("latency")

    def best(method, seed):
        used = opening if method == "mfkd" else None
        plan = Plan((LOW,), FULL, method, max_low=40, max_high=20, seed=seed, cost="latency", opening=used)
        rows = find_rows(DEVICE, [e.trial.architecture for e in full(run(plan, space=DEVICE))])
        return [TRUTH[rows[cost[rows] <= budget]].max(initial=0.0) for budget in budgets]

    ours, random = (np.mean([best(method, seed) for seed in range(3)], axis=0) for method in ("mfkd", "random"))
    assert (ours > random).all()


@pytest.mark.parametrize("method", FRONT_METHODS)
def test_a_front_search_keeps_the_contract_of_methods(method):
    """It respects the plan, asks nothing twice, keeps no state, and survives failures."""
    plan = Plan((LOW,), FULL, method, max_low=20, max_high=11, cost="latency", seed=2)

    for history in (run(plan, space=DEVICE), run(plan, space=DEVICE, answer=broken)):
        asked = [(e.trial.architecture, e.trial.fidelity, e.trial.seed) for e in history.answered]
        assert len(set(asked)) == len(asked) <= 31
        assert len(full(history)) == 11
        for cut in (0, 5, 15):
            seen = History(history.answered[:cut], [e.trial for e in history.answered[cut : cut + 2]])
            before = (list(seen.answered), list(seen.pending))
            first = propose(DEVICE, seen, plan, 3)
            assert propose(DEVICE, seen, plan, 3) == first
            assert (seen.answered, seen.pending) == before
    two = DEVICE.where(np.arange(len(DEVICE)) < 2)
    fail = lambda trial: Evaluation(trial, "oom", error="too big")  # noqa: E731
    assert len(run(replace(plan, max_low=50), space=two, answer=fail).answered) <= 4


def test_the_opening_of_a_front_search_is_spread_over_its_cost():
    plan = Plan((LOW,), FULL, cost="latency", opening=Fidelity("inherited", epochs=0))
    asked = propose(DEVICE, History(), plan, len(DEVICE))
    places = np.sort(DEVICE.cost("latency")[find_rows(DEVICE, [t.architecture for t in asked])])
    assert {t.fidelity for t in asked} == {plan.opening}
    np.testing.assert_allclose(places, np.linspace(0, 1, len(places)), atol=1.5 / len(places))


def test_the_shortlist_of_a_front_search_holds_what_adds_most_of_all_candidates():
    """And is short: a decision must not take longer in a larger space."""
    big = space(side=4, d=8)
    rng, low = np.random.default_rng(3), Fidelity("low", epochs=1)
    scored = [Trial(i, big.architecture(int(row)), low) for i, row in enumerate(rng.choice(len(big), 30))]
    history = History(list(map(answer, scored)))
    for i, row in enumerate(rng.choice(len(big), 12, replace=False)):
        accuracy = 0.3 + 0.02 * big.macs[row] / 1e6 + 0.05 * rng.random()
        history.answered.append(Evaluation(Trial(30 + i, big.architecture(int(row)), FULL), "ok", float(accuracy)))
    high = scores(big, history, FULL)
    fitted = estimate(big, [scores(big, history, low)], high, 0, SurrogateInputs())
    front = front_so_far(big, "macs", fitted, high)
    everything = np.arange(len(big))
    growth = front.growth(everything, fitted.mean, np.sqrt(fitted.variance))
    rows = front.shortlist(np.ones(len(big), dtype=bool))
    assert SHORTLIST <= len(rows) < 2 * SHORTLIST
    assert growth[rows].max() == pytest.approx(growth.max())
    assert set(np.argsort(-growth)[:20]) <= set(rows)


def test_an_unknown_cost_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="no cost named 'latency'; choose from macs, params; no latency of these"):
        propose(SPACE, History(), Plan((LOW,), FULL, cost="latency"), 4)
    two = replace(SPACE, trends={"latency:a": SPACE.macs, "latency:b": SPACE.macs, "proxy:x": SPACE.macs})
    with pytest.raises(UsageError, match="no cost named 'latency'; choose from macs, params, a_latency, b_latency$"):
        two.cost("latency")
    assert two.cost("b_latency") is two.trends["latency:b"]
    assert DEVICE.cost("latency") is DEVICE.cost("device_latency")


def test_workers_of_a_front_search_do_not_train_near_identical_networks():
    """Trials asked together, or pending, are spread over MACs."""
    plan = Plan((LOW,), FULL, max_low=24, max_high=40, cost="macs")
    seen = History(run(replace(plan, max_high=12)).answered)
    together = propose(SPACE, seen, plan, 6)
    macs = SPACE.macs[find_rows(SPACE, [t.architecture for t in together])]
    assert len(set(macs)) >= 4
    assert [t.fidelity for t in together] == [FULL] * 6
    seen.pending.extend(together[:3])
    later = propose(SPACE, seen, plan, 3)
    assert [t.architecture for t in later] == [t.architecture for t in together[3:]]


@pytest.mark.parametrize("free", [1, 4])
def test_a_search_that_starts_with_a_study_repeats_nothing_of_it(free):
    """Low scores of architectures outside the method's own first batch, as `--fidelity-study` imports them."""
    plan = Plan((LOW,), FULL, max_low=40, max_high=20)
    small = space(side=2)
    history = History([answer(Trial(i, small.architecture(3 * i), LOW)) for i in range(9)])
    while trials := propose(small, history, plan, free):
        history.answered.extend(map(answer, trials))
    asked = [(e.trial.architecture, e.trial.fidelity, e.trial.seed) for e in history.answered]
    assert len(set(asked)) == len(asked)
    assert len(full(history)) == 20


def test_a_plan_with_many_low_trials_waits_for_all_of_them():
    plan = Plan((LOW,), FULL, max_low=24, max_high=6)
    answered = run(plan).answered[:24]
    cut = History(answered[:20], [e.trial for e in answered[20:]])
    assert propose(SPACE, cut, plan, 4) == []
    assert propose(SPACE, History(answered), plan, 4)


@EVERY
def test_every_method_trains_in_full_if_low_trials_are_not_allowed_or_all_fail(method, space):
    def only_full(trial):
        return answer(trial) if trial.fidelity == FULL else Evaluation(trial, "oom", error="too big")

    for plan in (Plan((LOW,), FULL, method, max_low=low, max_high=3) for low in (0, 12)):
        assert len(full(run(plan, space=space, answer=only_full))) == 3


@EVERY
def test_every_method_asks_nothing_twice_with_few_candidates(method, space):
    few = space.where(np.arange(len(space)) < 6)
    history = run(Plan((LOW,), FULL, method, max_low=50, max_high=20), space=few)
    asked = [(e.trial.architecture, e.trial.fidelity, e.trial.seed) for e in history.answered]
    assert len(set(asked)) == len(asked)


def test_asha_stops_asking_low_trials_once_nothing_can_be_promoted():
    history = run(Plan((LOW,), FULL, "asha", max_low=200, max_high=3))
    assert len(full(history)) == 3
    assert len(history.answered) < 40


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, len(SPACE) - 1), max_size=30), st.booleans())
def test_find_rows_finds_candidates_and_marks_others(rows, stranger):
    from engine.trial import Architecture

    asked = [SPACE.architecture(row) for row in rows] + [Architecture((9,) * 5)] * stranger
    assert find_rows(SPACE, asked).tolist() == rows + [-1] * stranger


def test_scores_average_repeats_and_leave_failures_out():
    a, b = SPACE.architecture(3), SPACE.architecture(8)
    history = History(
        [
            Evaluation(Trial(0, a, FULL, 0), "ok", 0.4, seconds=2.0),
            Evaluation(Trial(1, b, FULL, 0), "oom", seconds=1.0),
            Evaluation(Trial(2, a, FULL, 1), "ok", 0.6, seconds=3.0),
        ],
        [Trial(3, SPACE.architecture(9), FULL, 0)],
    )
    got = scores(SPACE, history, FULL)
    assert (got.rows.tolist(), got.values.tolist(), got.counts.tolist()) == ([3], [0.5], [2.0])
    assert (got.asked.tolist(), got.pending.tolist(), got.trials) == ([3, 8, 9], [9], 4)
    assert got.times_asked == {3: 2, 8: 1, 9: 1}
    assert got.seconds == 2.0


def test_mfkd_without_a_low_budget_still_searches():
    history = run(Plan((LOW,), FULL, max_low=0, max_high=5), method=mfkd)
    assert [e.trial.fidelity for e in history.answered] == [FULL] * 5
