"""From the logits of one step to one token: logit bias, penalties, the filters, and the draw.

Every stage is a pure function on candidates, the pair (ids, logits), and reads alone:

    logits (n_vocab,) -> bias -> penalise -> top_k -> typical -> top_p -> min_p -> temperature -> draw
                      -> bias -> temperature -> mirostat (a truncation that steers itself) -> draw

Order, defaults and meaning are those of llama-llava-cli (llama.cpp c392e50, common/sampling.cpp and
src/llama-sampling.cpp), in float64 and with NumPy's PCG64 in place of its float32 and mt19937; so the
distributions agree, and the draws of one seed do not. One departure: there ``--typical`` never cuts
(``i >= min_keep - 1`` wraps around at the default min_keep of 0); here it does what its paper says.

A filter returns its survivors in the order in which they came, so what a seed draws depends on which
tokens survive, never on how a filter sorted them.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllava.errors import ModelError, UsageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RANDOM_SEEDS = (-1, 0xFFFFFFFF)  # both mean "any": one for people, one is llama.cpp's default
MIROSTAT_WINDOW = 100  # tokens; the m of Basu et al., with llama.cpp's value

# Field -> the option that sets it, least, most (both allowed), and the two in words.
_WHOLE: dict[str, tuple[str, int, int, str]] = {
    "top_k": ("--top-k", -(2**31), 2**31 - 1, "a whole number, 0 for all tokens"),
    "mirostat": ("--mirostat", 0, 2, "0, 1 or 2"),
    "repeat_last_n": ("--repeat-last-n", -1, 2**31 - 1, "a whole number, -1 for all tokens"),
    "seed": ("--seed", -1, 2**64 - 1, "a whole number, -1 for any"),
}
_REAL: dict[str, tuple[str, float, float, str]] = {
    "temperature": ("--temp", -1e6, 1e6, "a number, 0 for the most probable token"),
    "top_p": ("--top-p", 0, 1, "0..1"),
    "min_p": ("--min-p", 0, 1, "0..1"),
    "typical_p": ("--typical", 0, 1, "0..1"),
    "mirostat_lr": ("--mirostat-lr", 0, 1e6, "a number, 0 or more"),
    "mirostat_ent": ("--mirostat-ent", 0, 1e6, "a number of bits, 0 or more"),
    "repeat_penalty": ("--repeat-penalty", 1e-6, 1e6, "a number above 0, 1 for none"),
    "presence_penalty": ("--presence-penalty", -1e6, 1e6, "a number, 0 for none"),
    "frequency_penalty": ("--frequency-penalty", -1e6, 1e6, "a number, 0 for none"),
}


def _biases(biases: Any) -> tuple[tuple[int, float], ...]:
    """Pairs from a dict or from pairs, as plain numbers. UsageError for a bias that is NaN or +inf."""
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    result = tuple((int(token), float(bias)) for token, bias in pairs)
    for token, bias in result:
        if not bias < math.inf:
            raise UsageError("--logit-bias", f"{token} by {bias}", wanted="a finite number, or -inf")
    return result


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults: temperature 0.2 as in the original's cli.py, all else off. The command
    line takes a profile's instead (profile.py).

    UsageError, naming the command line's option, for a value outside its range.
    """

    temperature: float = 0.2  # 0 or less: always the most probable token
    top_k: int = 0  # tokens kept; 0 or less: all
    top_p: float = 1.0  # probability mass kept; 1: all
    min_p: float = 0.0  # share of the best token's probability that a token must reach; 0: none
    typical_p: float = 1.0  # probability mass kept, most typical tokens first; 1: all
    mirostat: int = 0  # 0 off, 1 or 2 the version; replaces the penalties and the four filters above
    mirostat_lr: float = 0.1  # eta: how fast the truncation follows the error
    mirostat_ent: float = 5.0  # tau: the surprise aimed at, in bits a token
    repeat_penalty: float = 1.0  # factor on the logit of a token seen lately; 1: none
    repeat_last_n: int = 64  # how many of the latest tokens count as "lately"; 0: none, -1: all
    presence_penalty: float = 0.0  # taken from the logit of a token seen lately, once
    frequency_penalty: float = 0.0  # taken from it for each time it was seen
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, added to its logit), or a dict; -inf forbids
    seed: int | None = None  # None or -1: another one each time

    def __post_init__(self) -> None:
        for table, kind in ((_WHOLE, Integral), (_REAL, Real)):
            for name, (option, least, most, wanted) in table.items():
                value: Any = getattr(self, name)
                if name == "seed" and value is None:
                    continue
                if not isinstance(value, kind) or not least <= float(value) <= most:  # NaN is in no bounds
                    raise UsageError(option, str(value), wanted=wanted)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))


class Candidates(NamedTuple):
    """Tokens that may still be chosen."""

    ids: Ints  # (n,)
    logits: Floats  # (n,) unnormalised log-probabilities

    def keep(self, chosen: npt.NDArray[Any]) -> Candidates:
        """Those at ``chosen`` (positions, in any order, or a mask), in the order in which they stand here."""
        if chosen.dtype != np.bool_:
            chosen = np.sort(chosen)
        return Candidates(self.ids[chosen], self.logits[chosen])


def softmax(logits: Floats) -> Floats:
    """Probabilities. The largest logit is subtracted first, so that exp() cannot overflow."""
    p = np.exp(logits - logits.max())
    return np.asarray(p / p.sum())


def descending(values: Floats) -> Ints:
    """Positions from the largest value to the smallest; equal values keep their order."""
    return np.argsort(-values, kind="stable")


def add_bias(candidates: Candidates, biases: Iterable[tuple[int, float]]) -> Candidates:
    """Add each bias to the logit of its token; one named twice gets both. UsageError if none is left."""
    ids, logits = candidates
    for token, bias in biases:
        logits = np.where(ids == token, logits + bias, logits)
    if not np.isfinite(logits).any():
        raise UsageError("--logit-bias", "it forbids every token", wanted="at least one left")
    return Candidates(ids, logits)


def penalise(
    candidates: Candidates, recent: Ints, repeat: float, frequency: float, presence: float
) -> Candidates:
    """Make the tokens in ``recent`` less probable.

    ``repeat`` is the penalty of Keskar et al. 2019 (CTRL, section 4.1), with llama.cpp's correction: the
    paper divides, but dividing a negative logit would raise it, so a negative one is multiplied. The other
    two are OpenAI's: ``presence`` counts a token once, ``frequency`` each time.
    """
    if not recent.size or (repeat, frequency, presence) == (1.0, 0.0, 0.0):
        return candidates
    ids, logits = candidates
    count = np.bincount(recent, minlength=int(ids.max()) + 1)[ids]  # (n,) how often each was seen
    repeated = np.where(logits > 0, logits / repeat, logits * repeat)
    return Candidates(ids, np.where(count > 0, repeated - count * frequency - presence, logits))


def top_k(candidates: Candidates, k: int) -> Candidates:
    """Keep the k most probable tokens (Fan et al. 2018). Of equals, those that come first."""
    if k <= 0 or k >= candidates.ids.size:
        return candidates
    return candidates.keep(descending(candidates.logits)[:k])


def top_p(candidates: Candidates, p: float) -> Candidates:
    """Keep the fewest most probable tokens with mass p or more: the nucleus (Holtzman et al. 2020)."""
    if p >= 1:
        return candidates
    probability = softmax(candidates.logits)
    order = descending(probability)
    n_short = np.count_nonzero(np.cumsum(probability[order]) < p)  # so many still fall short of p
    return candidates.keep(order[: n_short + 1])


def min_p(candidates: Candidates, p: float) -> Candidates:
    """Keep the tokens at least p times as probable as the best one (Nguyen et al. 2024)."""
    if p <= 0:
        return candidates
    return candidates.keep(candidates.logits >= candidates.logits.max() + math.log(p))


def typical(candidates: Candidates, p: float) -> Candidates:
    """Keep the tokens whose surprise is nearest to the entropy, until their mass exceeds p.

    Meister et al. 2022, "Locally Typical Sampling". The most probable token may go: where many are nearly
    as probable, it surprises less than a typical one.
    """
    if p >= 1:
        return candidates
    probability = softmax(candidates.logits)
    surprise = -np.log(np.maximum(probability, np.finfo(np.float64).tiny))  # (n,) nats; finite where p is 0
    entropy = probability @ surprise
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    n_short = np.count_nonzero(np.cumsum(probability[order]) <= p)
    return candidates.keep(order[: n_short + 1])


def temperature(candidates: Candidates, t: float) -> Candidates:
    """Divide the logits by t: below 1 the probable gain, above 1 the others. t <= 0: only the best stays."""
    ids, logits = candidates
    if t <= 0:
        return candidates.keep(np.array([logits.argmax()]))  # argmax: of equals, the first
    with np.errstate(over="ignore"):  # a tiny t sends all but the best to -inf, as it should
        return Candidates(ids, (logits - logits.max()) / t)


def mirostat_k(candidates: Candidates, mu: float, n_vocab: int, window: int = MIROSTAT_WINDOW) -> int:
    """Mirostat 1: how many tokens to keep for a surprise of mu bits (Basu et al. 2021, algorithm 1).

    Takes the probabilities for a Zipf law, p(i) ~ i^-s. Estimates s from the ``window`` most probable tokens,
    by least squares on the log-ratios of neighbours, and solves the law for k.
    """
    logits = -np.sort(-candidates.logits)[:window]
    logits = logits[np.isfinite(logits)]
    if logits.size < 2:
        return 1
    rank = np.arange(1, logits.size)
    t = np.log((rank + 1) / rank)
    s = float(np.clip(t @ -np.diff(logits) / (t @ t), 1e-6, 1e6))
    e = s - 1
    # k = (e 2^mu / (1 - n^-e))^(1/s), in logarithms; at e = 0 the fraction's limit is 1 / ln n.
    fraction = e / (1 - n_vocab**-e) if abs(e) > 1e-9 else 1 / math.log(n_vocab)
    log_k = (math.log(fraction) + mu * math.log(2)) / s
    return min(n_vocab, int(math.exp(min(max(log_k, 0.0), 50.0))))


def mirostat_cut(candidates: Candidates, mu: float) -> Candidates:
    """Mirostat 2: keep the tokens whose surprise is at most mu bits (Basu et al. 2021, algorithm 2).

    A token of probability 1/8 surprises by 3 bits. The most probable one always stays.
    """
    probability = softmax(candidates.logits)
    limit = min(2.0 ** -max(mu, 0.0), float(probability.max()))
    return candidates.keep(probability >= limit)


def run_chain(candidates: Candidates, recent: Ints, sampling: Sampling) -> Candidates:
    """All that comes before the draw, mirostat aside, in llama.cpp's order."""
    s = sampling
    candidates = add_bias(candidates, s.logit_bias)
    candidates = penalise(candidates, recent, s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
    candidates = top_k(candidates, s.top_k)
    candidates = typical(candidates, s.typical_p)
    candidates = top_p(candidates, s.top_p)
    candidates = min_p(candidates, s.min_p)
    return temperature(candidates, s.temperature)


class Sampler:
    """Chooses tokens, one at a time, and remembers what the penalties, mirostat and the seed need.

    >>> sampler = Sampler(Sampling(temperature=0), n_vocab=3)
    >>> sampler.sample(np.array([0.1, 2.0, -1.0]))
    1
    """

    def __init__(self, sampling: Sampling, n_vocab: int, seed: int | None = None) -> None:
        """``seed`` goes before the settings' own. ``.seed`` is the one in use, also where chance chose it."""
        seed = sampling.seed if seed is None else seed
        self.seed: int = secrets.randbits(32) if seed is None or seed in RANDOM_SEEDS else int(seed)
        for token, _ in sampling.logit_bias:
            if not 0 <= token < n_vocab:
                raise UsageError("--logit-bias", f"token {token}", wanted=f"0..{n_vocab - 1}")
        self.sampling = sampling
        self.n_vocab = n_vocab
        self.mu = 2 * sampling.mirostat_ent  # bits; the paper's start
        self._rng = np.random.Generator(np.random.PCG64(self.seed))
        last_n = sampling.repeat_last_n
        self._recent: deque[int] = deque(maxlen=None if last_n < 0 else last_n)

    def accept(self, token: int) -> None:
        """Let the penalties see ``token``. sample() does not: the caller knows what belongs to the text."""
        self._recent.append(int(token))

    def sample(self, logits: npt.ArrayLike) -> int:
        """One token for one step's logits (n_vocab,). ModelError if they are no distribution."""
        candidates = self._candidates(logits)
        if self.sampling.mirostat and self.sampling.temperature > 0:
            return self._mirostat(candidates)
        candidates = run_chain(candidates, np.array(self._recent, dtype=np.int64), self.sampling)
        return int(candidates.ids[self._draw(candidates)])

    def _candidates(self, logits: npt.ArrayLike) -> Candidates:
        """All tokens. The logits are checked here, once: the filters may rely on numbers below +inf."""
        values = np.array(logits, dtype=np.float64).reshape(-1)  # (n_vocab,) a copy
        if values.size != self.n_vocab:
            raise ModelError("logits", f"{values.size} values", wanted=f"one a token, {self.n_vocab}")
        bad = int(np.count_nonzero(~(values < np.inf)))  # NaN compares false
        if bad or not np.isfinite(values).any():
            found = f"{bad} of {values.size} are NaN or infinite" if bad else "all are -inf"
            raise ModelError("logits", found, wanted="finite numbers", hint="The model file may be damaged")
        return Candidates(np.arange(values.size), values)

    def _mirostat(self, candidates: Candidates) -> int:
        """Truncate so that the surprise is mu bits at most, draw, and move mu against the error."""
        s = self.sampling
        candidates = temperature(add_bias(candidates, s.logit_bias), s.temperature)
        if s.mirostat == 1:
            candidates = top_k(candidates, mirostat_k(candidates, self.mu, self.n_vocab))
        else:
            candidates = mirostat_cut(candidates, self.mu)
        position = self._draw(candidates)
        surprise = -math.log2(softmax(candidates.logits)[position])
        self.mu -= s.mirostat_lr * (surprise - s.mirostat_ent)
        return int(candidates.ids[position])

    def _draw(self, candidates: Candidates) -> int:
        """A position, drawn with its probability: where a uniform number falls among the cumulated ones."""
        cumulated = np.cumsum(softmax(candidates.logits))
        # Below the sum, so that rounding cannot step over the end; "right" steps over probability 0.
        u = min(self._rng.random() * cumulated[-1], np.nextafter(cumulated[-1], 0))
        return int(np.searchsorted(cumulated, u, side="right"))
