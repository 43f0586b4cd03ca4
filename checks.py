"""What is said of bad values: one message of each kind, in one place. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real


def check_choice(name: str, value, allowed: Iterable) -> None:
    """Raises a `ValueError` unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    # True equals 1: a choice between numbers is none between truth values.
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
        raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")


def check_choices(values: Mapping, **allowed: Iterable) -> None:
    """Raises a `ValueError` unless `values[name]` is one of `allowed[name]`, for every name."""
    for name, choices in allowed.items():
        check_choice(name, values[name], choices)


def check_integer(name: str, value, least: int, most: int | None = None) -> None:
    """Raises a `ValueError` unless `value` is a whole number, numpy's included, from `least` to `most`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or value < least
        or (most is not None and value > most)
    ):
        allowed = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"`{name}` must be an integer {allowed}, got {value!r}.")


def check_number(
    name: str,
    value,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises a `ValueError` unless `value` is a finite number, numpy's included, within the limits: `least` and `most`
    are allowed themselves, `above` and `below` are not."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not is_number
        or (least is not None and value < least)
        or (most is not None and value > most)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        limits = {"at least": least, "above": above, "at most": most, "below": below}
        allowed = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        if least is not None and most is not None:
            allowed = [f"between {least:g} and {most:g}"]
        raise ValueError(f"`{name}` must be {' and '.join(['a finite number', *allowed])}, got {value!r}.")


def check_keys(block: str, given: Iterable[str], known: Iterable[str], taker: str) -> None:
    """Raises a `ValueError` if a block of a configuration has a key that its `taker` does not know."""
    known = list(known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"`{block}` has no key {', '.join(unknown)}; {taker} takes {', '.join(known) or 'none'}.")
