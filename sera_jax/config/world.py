"""What the embedded world is made of."""

from __future__ import annotations

import dataclasses

from sera_jax.config.fields import one_of, within


@dataclasses.dataclass(frozen=True)
class WorldGroup:
    """The embedded world (sera_jax/world.py); an empty name means real data. Sizes are counts of rows, at most a
    million each.

    name: `habits` (an SFT model's likeliest answer is mostly right) or `wrong_habits` (it is mostly wrong).
    demonstrator: who writes the demonstrations, an author in `world_authors.AUTHORS`.
    cue: how strongly chatter, which is worth nothing, goes with the better answer of a pair, 0 (not at all) to 1.
    heldout_tasks: of name, repeat, first and last: those that no demonstration, preference pair or training prompt
        sets, though the pretraining text and everything held out do. Gold is then also said in and out of domain.
    """

    name: str = one_of("", "habits", "wrong_habits")
    pretrain: int = within(8000, 0, 10**6)
    demonstrations: int = within(200, 0, 10**6)
    preferences: int = within(800, 0, 10**6)
    heldout_preferences: int = within(400, 0, 10**6)
    heldout_prompts: int = within(200, 0, 10**6)
    heldout_demonstrations: int = within(200, 0, 10**6)
    prompts: int = within(0, 0, 10**6)
    demonstrator: str = "better"
    cue: float = within(0.6, 0, 1)
    heldout_tasks: tuple[str, ...] = ()
