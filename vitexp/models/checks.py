"""Checks of what a person gives a model: each returns the value in its right type or says what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from vitexp.errors import UserError, nearest


def whole(key: str, value: Any, *, at_least: int = 1) -> int:
    """A whole number of at least `at_least`. Raises UserError that names the key."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < at_least:
        raise UserError(f"{key}={value!r}: a whole number of at least {at_least} is needed")
    return number


def fraction(key: str, value: Any) -> float:
    """A number in [0, 1): a rate of something dropped. Raises UserError, also for NaN."""
    if not _is_number(value) or not 0 <= value < 1:
        raise UserError(f"{key}={value!r}: a number from 0 to below 1 is needed")
    return float(value)


def positive(key: str, value: Any) -> float:
    """A finite number above zero. Raises UserError."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise UserError(f"{key}={value!r}: a finite number above 0 is needed")
    return float(value)


def flag(key: str, value: Any) -> bool:
    """True or False, nothing that merely counts as one of them. Raises UserError."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={value!r}: true or false is needed")
    return value


def one_of(key: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed names. Raises UserError with all of them and the nearest."""
    if value not in allowed:
        raise UserError(f"{key}={value!r}: one of {', '.join(allowed)} is needed.{nearest(str(value), allowed)}")
    return value


def height_width(key: str, value: Any) -> tuple[int, int]:
    """(height, width) in pixels from one number or a pair. Raises UserError."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise UserError(f"{key}={list(value)}: one number or [height, width] is needed")
        return whole(key, value[0]), whole(key, value[1])
    side = whole(key, value)
    return side, side


def divides(divisor_key: str, divisor: int, number_key: str, number: int, *, shown: tuple[Any, Any]) -> None:
    """Raises UserError with the nearest divisors when `divisor` does not divide `number`; `shown` is as given."""
    if number % divisor == 0:
        return
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below, above = [d for d in divisors if d < divisor][-1:], [d for d in divisors if d > divisor][:1]
    close = ", ".join(str(d) for d in below + above)
    raise UserError(f"{divisor_key}={shown[0]} does not divide {number_key}={shown[1]}; nearest: {close}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
