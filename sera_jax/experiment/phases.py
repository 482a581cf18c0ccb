"""The phases of a run as the user meets them: counted before the first begins, each said in a line when it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from sera_jax import stamps

# What a phase does, by the last part of its name; what precedes it is the policy. `\1` is who scores.
_DOES = {
    r"init": "drawing random parameters",
    r"base": "reading the base model",
    r"pretrain": "pretraining the base model",
    r"sft": "the SFT model",
    r"sft_.*": "supervised fine-tuning",
    r"reward_model": "training the reward model",
    r"answers": "sampling answers of the SFT model",
    r"answers_by_(.*)": r"scoring these answers by \1",
    r"policy|reference": r"reading the \g<0>",
    r"(round|update)\d+": "training",
    r"iteration\d+": "PPO",
    r"pool": "scoring the offline pairs",
    r"heldout": "scoring the held-out pairs",
    r"heldout_demonstrations": "scoring the held-out demonstrations",
    r"generations": "answering the held-out prompts",
    r"generations_by_(.*)": r"scoring these answers by \1",
    r"generations_at_(.*)": r"answering them at temperature \1",
    r"draws_by_(.*)": r"scoring its answers at temperature 1 by \1",
    r"candidates\d*": "sampling candidates",
    r"candidates\d*_by_(.*)": r"scoring the candidates by \1",
    r"support": "sampling its own answers, for what it supports",
    r"support_by_(.*)": r"scoring these answers by \1",
    r"pairs\d+": "choosing the pairs",
    r"reference\d+": "scoring the pairs by the last round's policy",
}
_NUMBERED = re.compile(r"(round|update|iteration|pairs|reference)(\d+)")


def in_words(name: str) -> str:
    """The phase "sera/round2/pool" as "sera round 2, scoring the offline pairs"."""
    *of, last = name.replace("-", " ").split("/")  # a policy's name within another has - for /
    rule = next((rule for rule in _DOES if re.fullmatch(rule, last)), None)
    does = last if rule is None else re.sub(f"^{rule}$", _DOES[rule], last)
    if numbered := _NUMBERED.fullmatch(last):
        of.append(last if numbered[1] in ("update", "iteration") else f"round{numbered[2]}")
    elif last.startswith("sft_"):  # an arm that is SFT again
        of.append(last)
    return ", ".join(policy_in_words(part) for part in ("/".join(of), does) if part)


def policy_in_words(name: str) -> str:
    """The policy "sera/round2" as "sera round 2"."""
    return _NUMBERED.sub(r"\1 \2", name.replace("/", " "))


class Phases:
    """Says where in the run each phase is. To be told of every phase that is asked for (`Workdir.watch`)."""

    def __init__(self, names: Iterable[str], say: Callable[[str], None]) -> None:
        """`names`: of all phases that will be asked for, each once or more."""
        self.total, self._say = len(set(names)), say
        self._seen: set[str] = set()
        self._found = 0  # in a row: made before, or taken

    def __call__(self, name: str, finished: bool) -> None:
        stamps.moved(phase=in_words(name))
        if name in self._seen:
            return
        self._seen.add(name)
        if finished:
            self._found += 1
            return
        self._say_found(len(self._seen) - 1)
        self._say(f"phase {len(self._seen)} of {self.total}: {in_words(name)}")

    def end(self) -> None:
        """Says what was found at the end of the run."""
        self._say_found(len(self._seen))

    def _say_found(self, last: int) -> None:
        if self._found:
            first = last - self._found + 1
            which = f"phase {last}" if first == last else f"phases {first} to {last}"
            self._say(f"{which} of {self.total}: already there")
        self._found = 0
