"""What verifications and drafted tokens cost, in steps of the backbone.

Logarithms of seconds are sums: a plain step's, and what this work takes beyond it. The plain step
drifts, for the machine has other work and the text grows; what the rest takes in relation to it
hardly changes. A Kalman filter over these logarithms tells the two apart, as soon as plain steps
are seen among the verifications, and knows how far it may be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from river_llm.lossless.sources import number_within

_KNOTS = (2, 4, 6, 8, 12, 16, 32, 64, 128, 256)  # rows of a verification; straight in logarithms
_FIRST_ROWS = (1.03, 1.08, 1.15, 1.3, 1.6, 2.0, 3.5, 7.0, 14.0, 28.0)  # one row takes 1
_ROWS_SPREAD = 0.2  # how far these may be wrong, from knot to knot; here and below in logarithms
_DRAFT_SPREAD = 0.5  # and the guesses at drafted tokens
_SCALE_SPREAD = 4.0
_NOISE = 0.06  # of one measurement
_DRIFT = 0.02  # of the plain step, from one measurement to the next
_SLOW_DRIFT = 0.002  # of the rest
_FURTHEST = 3.0  # standard deviations by which a measurement is believed to be off
_MOST_SURPRISE = 0.5  # that one adds to what the plain step may be off by
_RESTORED_SPREAD = 0.05  # at least, of what another run has learnt
_LARGEST = 8.0  # logarithm that may come out of a file
_END = 30.0  # of a logarithm of which the exponential is taken


class StepCosts:
    """Learns from measured seconds. A step is the backbone's over one row."""

    def __init__(self, drafts: Sequence[float]) -> None:
        """`drafts` are guesses at what a drafted token takes, in steps, one for each way to
        draft."""
        rows = np.log(_FIRST_ROWS)
        self._mean = np.concatenate([[math.log(0.01)], rows, np.log(drafts)])
        self._covariance = np.zeros((len(self._mean), len(self._mean)))
        self._covariance[0, 0] = _SCALE_SPREAD**2
        steps = np.arange(1, len(rows) + 1) * _ROWS_SPREAD**2
        self._covariance[1 : 1 + len(rows), 1 : 1 + len(rows)] = np.minimum.outer(steps, steps)
        for draft in range(1 + len(rows), len(self._mean)):
            self._covariance[draft, draft] = _DRAFT_SPREAD**2
        # what a pass over 1, 2, ... rows sums of these values to the logarithm of its seconds
        self._of_rows = np.zeros((len(_WEIGHTS), len(self._mean)))
        self._of_rows[:, 0] = 1
        self._of_rows[:, 1 : 1 + len(rows)] = _WEIGHTS
        self._diagonal = slice(None, None, len(self._mean) + 1)
        self._rows: list[float] | None = None  # steps of 1, 2, ... rows; None: to be computed

    @property
    def seconds(self) -> float:
        """Of a plain step."""
        return math.exp(min(self._mean[0], _END))

    def note_verification(self, rows: int, seconds: float) -> None:
        """The backbone took so long over so many rows."""
        self._observe(self._of(rows), seconds)

    def note_draft(self, way: int, sequences: Sequence[int], seconds: float) -> None:
        """Drafting took so long: one step for each entry, over so many sequences."""
        direction = self._of(sequences[0]).copy()
        if sequences[-1] != sequences[0]:
            direction = np.mean([self._of(count) for count in sequences], axis=0)
        direction[1 + len(_KNOTS) + way] = 1
        self._observe(direction, seconds / len(sequences))

    def rows(self, count: int) -> float:
        """Steps that a verification of so many rows takes."""
        if self._rows is None:
            logs = _WEIGHTS @ self._mean[1 : 1 + len(_KNOTS)]
            self._rows = np.exp(np.minimum(logs, _END)).tolist()
        last = len(self._rows)
        return self._rows[count - 1] if count <= last else self._rows[-1] * count / last

    def drafted(self, way: int, sequences: int = 1) -> float:
        """Steps that one more drafted token for each of so many sequences takes."""
        return math.exp(min(self._mean[1 + len(_KNOTS) + way], _END)) * self.rows(sequences)

    def uncertainty(self, rows: int, others: int) -> float:
        """Standard deviation of the logarithm of what rows take in relation to others."""
        direction = self._of(rows) - self._of(others)
        return math.sqrt(max(0.0, float(direction @ self._covariance @ direction)))

    def to_dict(self) -> dict[str, list[float]]:
        """What was learnt about relations, as plain JSON values; the plain step isn't among it."""
        spread = np.sqrt(np.diag(self._covariance))
        return {"mean": self._mean[1:].round(4).tolist(), "spread": spread[1:].round(4).tolist()}

    def restore(self, learnt: dict[str, Any]) -> None:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        mean, spread = (
            np.array([number_within(value, -_LARGEST, _LARGEST) for value in learnt[name]])
            for name in ("mean", "spread")
        )
        if not len(mean) == len(spread) == len(self._mean) - 1:
            raise ValueError("these are no costs of steps")
        self._mean[1:] = mean
        self._covariance = np.diag([_SCALE_SPREAD**2, *np.maximum(spread, _RESTORED_SPREAD) ** 2])
        self._rows = None

    def _of(self, rows: int) -> NDArray[np.float64]:
        of_rows: NDArray[np.float64] = self._of_rows[min(rows, len(_WEIGHTS)) - 1]
        return of_rows

    def _observe(self, direction: NDArray[np.float64], seconds: float) -> None:
        spread = self._covariance @ direction
        variance = float(direction @ spread) + _NOISE**2
        error = math.log(max(seconds, 1e-9)) - float(direction @ self._mean)
        furthest = _FURTHEST * math.sqrt(variance)
        # a step that something held up, or all are different now: the next ones will tell
        surprise = max(0.0, abs(error) - furthest)
        error = min(max(error, -furthest), furthest)
        self._mean += spread * (error / variance)
        self._covariance -= spread[:, None] * (spread / variance)
        self._covariance.flat[self._diagonal] += _SLOW_DRIFT**2
        self._covariance[0, 0] += _DRIFT**2 + min(surprise, _MOST_SURPRISE) ** 2
        self._rows = None


def _weights() -> NDArray[np.float64]:
    """Of the knots in the logarithm for 1, 2, ... rows: `[rows, knots]`."""
    places = np.log([1, *_KNOTS])
    rows = np.log(np.arange(1, _KNOTS[-1] + 1))
    units = np.eye(len(places))[:, 1:]  # nothing for one row
    return np.stack([np.interp(rows, places, unit) for unit in units.T], axis=1)


_WEIGHTS = _weights()
