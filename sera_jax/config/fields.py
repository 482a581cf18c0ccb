"""What a config field may be, as metadata of the field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

RANGE, CHOICES = "range", "choices"  # of a field's metadata


def at_least(default: Any, low: float) -> Any:
    """A number of at least `low`."""
    return dataclasses.field(default=default, metadata={RANGE: (low, math.inf, True)})


def within(default: Any, low: float, high: float) -> Any:
    """A number from `low` to `high`, both allowed."""
    return dataclasses.field(default=default, metadata={RANGE: (low, high, True)})


def above(default: Any, low: float, high: float = math.inf) -> Any:
    """A number above `low`, and at most `high`."""
    return dataclasses.field(default=default, metadata={RANGE: (low, high, False)})


def one_of(default: str, *others: str) -> Any:
    """One of these names."""
    return dataclasses.field(default=default, metadata={CHOICES: (default, *others)})
