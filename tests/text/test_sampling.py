"""Sampling: worked by hand, properties, statistics under a fixed seed, and llama.cpp's chain next door."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyllava.errors import ModelError, UsageError
from tinyllava.text import sampling as S
from tinyllava.text.sampling import Candidates, Sampler, Sampling

HALVES = np.log([0.5, 0.25, 0.125, 0.0625, 0.0625])  # logits whose probabilities are easy by hand


def candidates(logits: object) -> Candidates:
    values = np.asarray(logits, dtype=np.float64)
    return Candidates(np.arange(values.size), values)


def kept(result: Candidates) -> list[int]:
    return [int(i) for i in result.ids]


logits_arrays = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-50, 50, width=32))
distinct_logits = st.lists(st.integers(-5000, 5000), min_size=1, max_size=40, unique=True).map(
    lambda hundredths: np.array(hundredths) / 100
)
any_float32 = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=False))
fractions = st.floats(0, 1)

FILTERS = {
    "top_k": (S.top_k, st.integers(-1, 45)),
    "top_p": (S.top_p, fractions),
    "min_p": (S.min_p, fractions),
    "typical": (S.typical, fractions),
    "temperature": (S.temperature, st.floats(-1, 5)),
    "mirostat_cut": (S.mirostat_cut, st.floats(-5, 30)),
}


# --- worked by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n", [(0, 5), (-1, 5), (1, 1), (4, 4), (9, 5)])
def test_top_k_by_hand(k: int, n: int) -> None:
    assert kept(S.top_k(candidates(HALVES), k)) == list(range(n))


@pytest.mark.parametrize("p, n", [(0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 5)])
def test_top_p_by_hand(p: float, n: int) -> None:
    assert kept(S.top_p(candidates(HALVES), p)) == list(range(n))


@pytest.mark.parametrize("p, n", [(0.0, 5), (0.2, 3), (0.3, 2), (1.0, 1)])
def test_min_p_by_hand(p: float, n: int) -> None:
    assert kept(S.min_p(candidates(HALVES), p)) == list(range(n))


def test_typical_by_hand() -> None:
    # Surprises are 1, 2, 3, 4, 4 bits; the entropy is 0.5 + 0.5 + 0.375 + 0.25 + 0.25 = 1.875 bits.
    # Nearest first: 1 (0.125 away), 0 (0.875), 2 (1.125), then 3 and 4 (2.125).
    assert kept(S.typical(candidates(HALVES), 0.1)) == [1]
    assert kept(S.typical(candidates(HALVES), 0.3)) == [0, 1]
    assert kept(S.typical(candidates(HALVES), 0.8)) == [0, 1, 2]
    assert kept(S.typical(candidates(HALVES), 1.0)) == [0, 1, 2, 3, 4]


def test_temperature_by_hand() -> None:
    # At t = 0.5 probabilities are squared and normalised again: 16 : 4 : 1 for 4 : 2 : 1.
    p = S.softmax(S.temperature(candidates(np.log([4.0, 2.0, 1.0])), 0.5).logits)
    np.testing.assert_allclose(p, np.array([16, 4, 1]) / 21, rtol=1e-14)


def test_penalties_by_hand() -> None:
    # Token 1 was seen twice, token 2 once. Positive logits are divided, negative ones multiplied.
    seen = np.array([1, 2, 1])
    result = S.penalise(candidates([1.0, 4.0, -4.0]), seen, repeat=2.0, frequency=0.25, presence=0.5)
    np.testing.assert_array_equal(result.logits, [1.0, 4 / 2 - 2 * 0.25 - 0.5, -4 * 2 - 0.25 - 0.5])


def test_mirostat_k_of_an_exact_zipf_law() -> None:
    # Basu et al.: under p(i) ~ i^-s the k that gives a surprise of mu solves the law; s = 2, n = 1000, mu = 4
    # give sqrt(1 * 16 / (1 - 1/1000)) = 4.002.
    law = candidates(-2 * np.log(np.arange(1, 1001)))
    assert S.mirostat_k(law, 4.0, 1000) == 4
    assert S.mirostat_k(law, -10.0, 1000) == 1
    assert S.mirostat_k(law, 1e5, 1000) == 1000


def test_mirostat_k_at_s_of_one_is_the_limit() -> None:
    def at(s: float) -> int:
        return S.mirostat_k(candidates(-s * np.log(np.arange(1, 101))), 8.0, 100)

    assert at(1.0) == int(2**8 / math.log(100)) == 55
    assert abs(at(1.0) - at(1.0001)) <= 1


def test_mirostat_2_by_hand() -> None:
    assert kept(S.mirostat_cut(candidates(HALVES), 3.0)) == [0, 1, 2]
    assert kept(S.mirostat_cut(candidates(HALVES), 2.5)) == [0, 1]
    assert kept(S.mirostat_cut(candidates(HALVES), 0.2)) == [0]  # the best stays, whatever its surprise


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_moves_mu_by_the_error(version: int) -> None:
    # A lone possible token surprises by 0 bits, so mu rises by eta * tau.
    sampler = Sampler(Sampling(mirostat=version, mirostat_lr=0.5, mirostat_ent=3.0, seed=1), 3)
    assert sampler.mu == 6.0
    assert sampler.sample([-np.inf, 0.0, -np.inf]) == 1
    assert sampler.mu == 6.0 + 0.5 * 3.0


def test_logit_bias_adds_up_and_forbids() -> None:
    result = S.add_bias(candidates([0.0, 1.0, 2.0]), [(0, 1.5), (0, 1.0), (2, -math.inf)])
    np.testing.assert_array_equal(result.logits, [2.5, 1.0, -np.inf])
    assert Sampler(Sampling(temperature=0, logit_bias={2: -math.inf}), 3).sample([0, 1, 2]) == 1


# --- greedy, history and order ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0])
def test_greedy_takes_the_lowest_id_of_equals(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, mirostat=2), 4)
    assert [sampler.sample([1.0, 3.0, 3.0, 2.0]) for _ in range(5)] == [1] * 5


def test_the_window_forgets_and_sampling_does_not_accept_by_itself() -> None:
    sampler = Sampler(Sampling(temperature=0, presence_penalty=10.0, repeat_last_n=2), 3)
    logits = [3.0, 2.0, 1.0]
    assert sampler.sample(logits) == sampler.sample(logits) == 0
    sampler.accept(0)
    assert sampler.sample(logits) == 1
    sampler.accept(1)
    assert sampler.sample(logits) == 2
    sampler.accept(2)  # 0 leaves the window of two
    assert sampler.sample(logits) == 0


def test_a_window_of_none_and_of_all() -> None:
    for last_n, expected in ((0, 0), (-1, 1)):
        sampler = Sampler(Sampling(temperature=0, repeat_penalty=5.0, repeat_last_n=last_n), 2)
        for token in [0] + [1] * 1000 * (last_n == 0) + [0] * 1000:
            sampler.accept(token)
        assert sampler.sample([3.0, 2.0]) == expected


def test_the_order_is_that_of_llama_cpp() -> None:
    # Temperature last: top-p sees the unheated distribution. Penalties first: they decide who is in top-k.
    hot = S.run_chain(candidates(HALVES), np.array([], dtype=np.int64), Sampling(temperature=100, top_p=0.5))
    assert kept(hot) == [0]
    s = Sampling(temperature=1, top_k=1, presence_penalty=9.0)
    assert kept(S.run_chain(candidates(HALVES), np.array([0]), s)) == [1]


def test_mirostat_replaces_filters_and_penalties() -> None:
    s = Sampling(temperature=1, mirostat=2, top_k=1, presence_penalty=9.0, seed=3)
    sampler = Sampler(s, 5)
    sampler.accept(0)
    assert set(sampler.sample(HALVES) for _ in range(200)) >= {0, 1, 2}


# --- properties ---------------------------------------------------------------------------------------


@given(logits=logits_arrays, k=st.integers(1, 45))
def test_top_k_keeps_the_k_most_probable(logits: np.ndarray, k: int) -> None:
    result = S.top_k(candidates(logits), k)
    assert len(result.ids) == min(k, len(logits))
    assert sorted(result.logits) == sorted(logits)[-k:]


@given(logits=logits_arrays, p=fractions)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    probability = S.softmax(logits)
    ids = S.top_p(candidates(logits), p).ids
    mass = probability[ids].sum()
    assert mass >= p - 1e-9
    assert len(ids) == 1 or p >= 1 or mass - probability[ids].min() < p + 1e-9
    rest = np.delete(probability, ids)
    assert not rest.size or rest.max() <= probability[ids].min()


@given(logits=logits_arrays, p=st.floats(1e-6, 1))
def test_min_p_keeps_exactly_those_that_reach_the_share(logits: np.ndarray, p: float) -> None:
    ids = S.min_p(candidates(logits), p).ids
    share = S.softmax(logits) / S.softmax(logits).max()
    assert (share[ids] >= p * (1 - 1e-9)).all()
    assert (np.delete(share, ids) <= p * (1 + 1e-9)).all()


@given(logits=logits_arrays, p=st.floats(0, 0.999))
def test_typical_keeps_the_nearest_to_the_entropy_until_mass_p(logits: np.ndarray, p: float) -> None:
    probability = S.softmax(logits)
    surprise = -np.log(probability)
    distance = np.abs(surprise - probability @ surprise)
    ids = S.typical(candidates(logits), p).ids
    mass = probability[ids].sum()
    assert mass > p - 1e-9
    rest = np.delete(distance, ids)
    assert not rest.size or rest.min() >= distance[ids].max() - 1e-9
    last = probability[ids[distance[ids] >= distance[ids].max() - 1e-9]].max()
    assert len(ids) == 1 or mass - last <= p + 1e-9


@pytest.mark.parametrize("name", FILTERS)
@given(data=st.data(), logits=distinct_logits)
def test_a_filter_does_not_mind_a_permutation(name: str, data: st.DataObject, logits: np.ndarray) -> None:
    """Who survives depends on the logits, not on where they stand. (Ties are decided by place, so: none.)"""
    apply, settings = FILTERS[name]
    setting = data.draw(settings)
    if name == "typical":  # two tokens on either side of the entropy may be equally near
        p = S.softmax(logits)
        distance = np.sort(np.abs(np.log(p) - p @ np.log(p)))
        assume((np.diff(distance) > 1e-9).all())
    order = np.array(data.draw(st.permutations(range(len(logits)))))
    here = apply(candidates(logits), setting)
    there = apply(Candidates(order, logits[order]), setting)
    if name in ("top_p", "typical"):  # a sum in another order may cross p by a rounding error
        assert abs(len(here.ids) - len(there.ids)) <= 1
    else:
        assert set(kept(here)) == set(kept(there))


@pytest.mark.parametrize("name", FILTERS)
@given(data=st.data(), logits=any_float32)
def test_a_filter_survives_any_logits(name: str, data: st.DataObject, logits: np.ndarray) -> None:
    """At least one survivor, all in the order in which they came; no NaN, no warning (an error here)."""
    assume(np.isfinite(logits).any() and not np.isposinf(logits).any())
    apply, settings = FILTERS[name]
    result = apply(candidates(logits), data.draw(settings))
    assert len(result.ids) >= 1 and kept(result) == sorted(kept(result))
    assert not np.isnan(result.logits).any()


samplings = st.builds(
    Sampling,
    temperature=st.floats(-1, 3),
    top_k=st.integers(-1, 50),
    top_p=fractions,
    min_p=fractions,
    typical_p=fractions,
    mirostat=st.sampled_from([0, 0, 1, 2]),
    mirostat_lr=st.floats(0, 10),
    mirostat_ent=st.floats(0, 100),
    repeat_penalty=st.floats(0.1, 10),
    repeat_last_n=st.integers(-1, 8),
    presence_penalty=st.floats(-5, 5),
    frequency_penalty=st.floats(-5, 5),
)


@given(logits=any_float32, settings=samplings, seed=st.integers(0, 2**64 - 1))
def test_the_same_seed_draws_the_same_tokens(logits: np.ndarray, settings: Sampling, seed: int) -> None:
    assume(np.isfinite(logits).any() and not np.isposinf(logits).any())

    def run() -> list[int]:
        sampler = Sampler(settings, len(logits), seed)
        tokens = []
        for _ in range(5):
            tokens.append(sampler.sample(logits))
            sampler.accept(tokens[-1])
        return tokens

    first = run()
    assert first == run()
    assert all(logits[t] > -np.inf for t in first)


@given(logits=logits_arrays, recent=st.lists(st.integers(0, 39), max_size=30), order=st.randoms())
def test_penalties_follow_their_formula_and_ignore_the_order_of_history(
    logits: np.ndarray, recent: list[int], order: object
) -> None:
    recent = [t for t in recent if t < len(logits)]
    shuffled = list(recent)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    result = S.penalise(candidates(logits), np.array(recent, dtype=np.int64), 1.3, 0.2, 0.7)
    again = S.penalise(candidates(logits), np.array(shuffled, dtype=np.int64), 1.3, 0.2, 0.7)
    np.testing.assert_array_equal(result.logits, again.logits)
    for token, logit in enumerate(logits):
        n = Counter(recent)[token]
        expected = (logit / 1.3 if logit > 0 else logit * 1.3) - n * 0.2 - 0.7 if n else logit
        assert result.logits[token] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(logits=distinct_logits, shift=st.floats(-100, 100), seed=st.integers(0, 9))
def test_adding_a_constant_to_all_logits_changes_nothing(logits: np.ndarray, shift: float, seed: int) -> None:
    s = Sampling(temperature=0.7, top_k=5, seed=seed)
    assert Sampler(s, len(logits)).sample(logits) == Sampler(s, len(logits)).sample(logits + shift)


# --- statistics: fixed seeds, so these cannot flicker ---------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(t: float) -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -np.inf])
    sampler = Sampler(Sampling(temperature=t, seed=42), 6)
    n = 4000
    seen = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=6)
    expected = n * S.softmax(logits / t)
    chi_square = ((seen[:5] - expected[:5]) ** 2 / expected[:5]).sum()
    assert chi_square < 18.47  # 0.1% point of chi-square with 4 degrees of freedom
    assert seen[5] == 0


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_reaches_its_surprise(version: int) -> None:
    logits = -1.1 * np.log(np.arange(1, 2001))  # about Zipf's law, as of words
    p = S.softmax(logits)
    sampler = Sampler(Sampling(temperature=1, mirostat=version, mirostat_ent=3.0, seed=7), 2000)
    surprises = []
    for _ in range(1500):
        mu = sampler.mu
        token = sampler.sample(logits)
        if version == 1:
            left = S.top_k(candidates(logits), S.mirostat_k(candidates(logits), mu, 2000))
        else:
            left = S.mirostat_cut(candidates(logits), mu)
        surprises.append(-math.log2(p[token] / p[left.ids].sum()))
    assert np.mean(surprises[500:]) == pytest.approx(3.0, abs=0.1)


def test_two_runs_without_a_seed_differ_and_say_their_seed() -> None:
    first, second = Sampler(Sampling(), 9), Sampler(Sampling(seed=-1), 9)
    assert first.seed != second.seed
    logits = np.zeros(9)
    replay = Sampler(Sampling(), 9, seed=first.seed)
    assert [first.sample(logits) for _ in range(20)] == [replay.sample(logits) for _ in range(20)]


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_p": 1.5}, "--top-p: 1.5; wanted 0..1"),
        ({"top_p": -0.1}, "--top-p: -0.1; wanted 0..1"),
        ({"min_p": 2}, "--min-p: 2; wanted 0..1"),
        ({"typical_p": math.nan}, "--typical: nan; wanted 0..1"),
        ({"temperature": math.inf}, "--temp: inf; wanted a number, 0 for the most probable token"),
        ({"temperature": "warm"}, "--temp: warm; wanted a number, 0 for the most probable token"),
        ({"top_k": 1.5}, "--top-k: 1.5; wanted a whole number, 0 for all tokens"),
        ({"mirostat": 3}, "--mirostat: 3; wanted 0, 1 or 2"),
        ({"mirostat_lr": -1}, "--mirostat-lr: -1; wanted a number, 0 or more"),
        ({"mirostat_ent": -1}, "--mirostat-ent: -1; wanted a number of bits, 0 or more"),
        ({"repeat_penalty": 0}, "--repeat-penalty: 0; wanted a number above 0, 1 for none"),
        ({"repeat_last_n": -2}, "--repeat-last-n: -2; wanted a whole number, -1 for all tokens"),
        ({"presence_penalty": math.inf}, "--presence-penalty: inf; wanted a number, 0 for none"),
        ({"frequency_penalty": math.nan}, "--frequency-penalty: nan; wanted a number, 0 for none"),
        ({"seed": -5}, "--seed: -5; wanted a whole number, -1 for any"),
        ({"logit_bias": {3: math.nan}}, "--logit-bias: 3 by nan; wanted a finite number, or -inf"),
    ],
)
def test_a_bad_setting_names_its_option(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_logits_that_are_no_distribution_are_refused() -> None:
    sampler = Sampler(Sampling(), 3)
    for logits in ([0, math.nan, 1], [0, math.inf, 1], [-math.inf] * 3, [0, 1], np.zeros((2, 3))):
        with pytest.raises(ModelError, match="logits: "):
            sampler.sample(logits)


def test_a_bias_outside_the_vocabulary_or_on_all_of_it_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--logit-bias: token 3; wanted 0\.\.2"):
        Sampler(Sampling(logit_bias=((3, 1.0),)), 3)
    with pytest.raises(UsageError, match="forbids every token"):
        Sampler(Sampling(logit_bias={i: -math.inf for i in range(3)}), 3).sample(np.zeros(3))


def test_the_default_is_the_original_s_temperature_and_nothing_else() -> None:
    chain = S.run_chain(candidates(HALVES), np.array([0, 1, 1]), Sampling())
    np.testing.assert_allclose(S.softmax(chain.logits), S.softmax(HALVES / 0.2), rtol=1e-12)
