"""Who writes the answers of the embedded worlds, as data: how often each author does what.

Worlds differ in two authors, of the base's text and of the demonstrations (`AUTHORS`). In `habits` the likeliest answer
of an SFT model is mostly right, so that sharpening alone looks like a gain; in `wrong_habits` it is the slip, without
opener and closing: its greedy answers are wrong from habit, and only preferences or the reward can mend them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Habits:
    """How often an author of responses does each thing (probabilities).

    Attributes:
        right: the body is right.
        slip: of the wrong bodies, the share that is the task's systematic slip; the rest have one stray word.
        opener, closing, twice, chatter: the response has it.
    """

    right: float
    slip: float
    opener: float
    closing: float
    twice: float
    chatter: float


_OTHERS: dict[str, Habits] = {
    "good": Habits(right=1.0, slip=0.0, opener=1.0, closing=1.0, twice=0.0, chatter=0.0),
    "careful": Habits(right=0.8, slip=0.7, opener=0.6, closing=0.6, twice=0.2, chatter=0.5),
    "careless": Habits(right=0.3, slip=0.7, opener=0.4, closing=0.3, twice=0.3, chatter=0.5),
}
# World -> its authors. `base` writes the pretraining text, `better` the few demonstrations, `good` what a perfect
# annotator would write. The preference pairs come from `careful` and `careless`, neither of which is the policy that is
# trained on them.
AUTHORS: dict[str, dict[str, Habits]] = {
    "habits": {
        "base": Habits(right=0.5, slip=0.8, opener=0.3, closing=0.3, twice=0.3, chatter=0.3),
        "better": Habits(right=0.65, slip=0.7, opener=0.5, closing=0.5, twice=0.2, chatter=0.3),
        **_OTHERS,
    },
    "wrong_habits": {
        "base": Habits(right=0.25, slip=0.9, opener=0.15, closing=0.15, twice=0.3, chatter=0.3),
        "better": Habits(right=0.42, slip=0.9, opener=0.4, closing=0.4, twice=0.2, chatter=0.3),
        **_OTHERS,
    },
}
