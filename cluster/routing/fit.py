"""What each worker costs, fitted while it works. Pure: values in, values out.

Two terms are fitted at a time, neither ever negative: seconds = scale * (a * x + b * y)

    prefill   a prompt's computed tokens and its pairs, and the seconds that its steps took
    decode    one step and the sequences in it, and the seconds between two tokens of a stream

*Shape* (a to b) by least squares of the relative error, slowly: an observation's weight halves with
every `HALF_LIFE` that come after it, and the prior stands in it like two of its own. *Scale* by a
moving geometric mean, fast: a worker that became ten times slower is known within thirty prompts.

*Outliers.* An observation counts as at most `MOST_OFF` times what was expected (more at first), and
at least as that part of it: a pause of a minute is one observation of four times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from cluster.policy import Coefficients, pairs

HALF_LIFE = 64
MOST_OFF = 4.0
_MOST_OFF_AT_FIRST = 16.0
_AT_FIRST = 8
_LEAST_SHARE = 1 / 12
"""Of a new observation in a moving mean."""
_DECAY = 0.5 ** (1 / HALF_LIFE)
_PRIOR_WEIGHT = 2.0
_FARTHEST = 1e4
"""Coefficients stay within this factor of the prior."""
LEAST_OBSERVATIONS = 3
"""A worker with fewer is taken to be like its pool."""


@dataclass(frozen=True, slots=True)
class TwoTerms:
    """`a * x + b * y`. `prior`: how both begin; `at`: two typical (x, y) that the prior is worth an
    observation at, each.
    """

    prior: tuple[float, float]
    at: tuple[tuple[float, float], tuple[float, float]]
    count: int = 0
    scale: float = 1.0
    _xx: float = 0.0
    _xy: float = 0.0
    _yy: float = 0.0
    _x: float = 0.0
    _y: float = 0.0

    def seen(self, x: float, y: float, seconds: float) -> TwoTerms:
        """With one observation more. What cannot be one (nothing done, no time) is passed over."""
        if not (x >= 0 and y >= 0 and x + y > 0 and 0 < seconds < float("inf")):
            return self
        expected = self.predict(x, y)
        off = _clipped(seconds / expected, self.count)
        scale = _moved(self.scale, off, self.count)
        off = min(max(off * self.scale / scale, 0.5), 2.0)
        # In units of what was expected, so that long and short prompts weigh alike.
        x, y = x * self.scale / expected, y * self.scale / expected
        return replace(
            self,
            count=self.count + 1,
            scale=min(max(scale, 1 / _FARTHEST), _FARTHEST),
            _xx=self._xx * _DECAY + x * x,
            _xy=self._xy * _DECAY + x * y,
            _yy=self._yy * _DECAY + y * y,
            _x=self._x * _DECAY + x * off,
            _y=self._y * _DECAY + y * off,
        )

    def predict(self, x: float, y: float) -> float:
        """Seconds; above 0."""
        a, b = self.terms
        return max(a * x + b * y, 1e-12)

    @property
    def terms(self) -> tuple[float, float]:
        """a and b, with the scale in them."""
        a, b = self._shape()
        return a * self.scale, b * self.scale

    def _shape(self) -> tuple[float, float]:
        xx, xy, yy, x, y = self._xx, self._xy, self._yy, self._x, self._y
        if not self.count:
            return self.prior
        for at_x, at_y in self.at:
            known = self.prior[0] * at_x + self.prior[1] * at_y
            at_x, at_y = at_x / known, at_y / known
            # As the observations grow many, the prior fades with them.
            weight = _PRIOR_WEIGHT / (1 + self.count)
            xx += weight * at_x * at_x
            xy += weight * at_x * at_y
            yy += weight * at_y * at_y
            x += weight * at_x
            y += weight * at_y
        determinant = xx * yy - xy * xy
        if determinant > 1e-12 * xx * yy:
            a, b = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
        else:
            a, b = x / xx, 0.0
        if a < 0:
            a, b = 0.0, y / yy
        elif b < 0:
            a, b = x / xx, 0.0
        return _near(a, self.prior[0]), _near(b, self.prior[1])


def _clipped(off: float, count: int) -> float:
    most = MOST_OFF if count >= _AT_FIRST else _MOST_OFF_AT_FIRST
    return min(max(off, 1 / most), most)


def _moved(value: float, off: float, count: int) -> float:
    """A moving geometric mean with one ratio more."""
    return value * float(off ** max(1 / (count + 3), _LEAST_SHARE))


def _near(value: float, prior: float) -> float:
    return min(max(value, 0.0), prior * _FARTHEST)


@dataclass(frozen=True, slots=True)
class Rate:
    """One positive number, by its logarithm's moving mean: as robust, and as slow."""

    prior: float
    value: float
    count: int = 0

    def seen(self, value: float) -> Rate:
        if not 0 < value < float("inf"):
            return self
        moved = _moved(self.value, _clipped(value / self.value, self.count), self.count)
        bounded = min(max(moved, self.prior / _FARTHEST), self.prior * _FARTHEST)
        return Rate(self.prior, bounded, self.count + 1)


_PRIOR = Coefficients()


def _prompts() -> TwoTerms:
    # Some 0: a prior without any attention would forbid to learn it.
    pair_s = max(_PRIOR.pair_s, _PRIOR.token_s * 1e-7)
    return TwoTerms(
        (_PRIOR.token_s, pair_s), ((2_048, pairs(0, 2_048)), (8_192, pairs(122_880, 131_072)))
    )


def _steps() -> TwoTerms:
    return TwoTerms((_PRIOR.step_s, _PRIOR.sequence_s), ((1, 1), (1, 16)))


@dataclass(frozen=True, slots=True)
class Fit:
    """All that is known of one worker. Each method returns the fit with one observation more."""

    prompts: TwoTerms = field(default_factory=_prompts)
    steps: TwoTerms = field(default_factory=_steps)
    fetch: Rate = Rate(_PRIOR.fetch_bytes_per_s, _PRIOR.fetch_bytes_per_s)
    stay: Rate = Rate(_PRIOR.stay_s, _PRIOR.stay_s)

    def read(self, start: int, end: int, seconds: float) -> Fit:
        """The steps for tokens [start, end) of a prompt took so long."""
        if not 0 <= start < end:
            return self
        return replace(self, prompts=self.prompts.seen(end - start, pairs(start, end), seconds))

    def fetched(self, size_bytes: int, seconds: float) -> Fit:
        """So much came from the store, with nothing else in the way."""
        return replace(self, fetch=self.fetch.seen(size_bytes / max(seconds, 1e-9)))

    def drew(self, tokens: int, seconds: float, *, sequences: float) -> Fit:
        """A stream's tokens after its first, in a batch of so many sequences on average."""
        if tokens < 1:
            return self
        return replace(self, steps=self.steps.seen(1, max(sequences, 1.0), seconds / tokens))

    def stayed(self, seconds: float) -> Fit:
        """An answer held its place so long."""
        return replace(self, stay=self.stay.seen(seconds))


NEW = Fit()


def coefficients_of(
    fits: Mapping[str, Fit], like: Mapping[str, Iterable[str]]
) -> dict[str, Coefficients]:
    """By worker id. `like`: each worker's pool: what is not known of a worker yet is the median of
    those of its pool of whom it is, and the prior if it is of nobody.
    """
    return {worker_id: _of(fits, worker_id, tuple(pool)) for worker_id, pool in like.items()}


def _of(fits: Mapping[str, Fit], worker_id: str, pool: tuple[str, ...]) -> Coefficients:
    own = fits.get(worker_id, NEW)
    others = [fits[other] for other in pool if other in fits]

    def known(count: int) -> bool:
        return count >= LEAST_OBSERVATIONS

    prompts, steps = own.prompts.terms, own.steps.terms
    fetch, stay = own.fetch.value, own.stay.value
    if not known(own.prompts.count):
        prompts = _middle([f.prompts.terms for f in others if known(f.prompts.count)], prompts)
    if not known(own.steps.count):
        steps = _middle([f.steps.terms for f in others if known(f.steps.count)], steps)
    if not known(own.fetch.count):
        fetch = median([f.fetch.value for f in others if known(f.fetch.count)] or [fetch])
    if not known(own.stay.count):
        stay = median([f.stay.value for f in others if known(f.stay.count)] or [stay])
    return Coefficients(
        token_s=prompts[0],
        pair_s=prompts[1],
        fetch_bytes_per_s=fetch,
        step_s=steps[0],
        sequence_s=steps[1],
        stay_s=stay,
    )


def _middle(terms: list[tuple[float, float]], own: tuple[float, float]) -> tuple[float, float]:
    """The median worker's terms, which belong together."""
    return sorted(terms)[len(terms) // 2] if terms else own
