"""What a run reads, by method: preference pairs for SeRA, demonstrations and new prompts for Self-Rewarding PPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.config import Config, DataGroup
from sera_jax.data.items import Item, PairItem, unique_prompts
from sera_jax.data.loading import flip_labels, load_demonstrations, load_preferences, load_prompts, split_heldout
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.loops.study import Gold


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything a run reads, as tokens.

    Attributes:
        tokenizer, tokenizer_dir: the tokenizer and the folder it was loaded from.
        train: preference pairs, after label noise. heldout: pairs of other prompts, clean. Both empty for SRPPO.
        demonstrations: what SFT imitates; `demonstrations_are` says where they come from.
        heldout_demonstrations: demonstrations of other prompts (SRPPO only).
        pretrain: texts for a base model from scratch.
        prompts: what bootstrapping samples on; for SRPPO the new prompts, which no demonstration has.
        prompts_left_out: how many of data.prompts are not among the new prompts, by reason (SRPPO only).
        eval_prompts: what held-out generations answer.
        gold: reward of (prompt item, response tokens), in the embedded world.
    """

    tokenizer: Tokenizer
    tokenizer_dir: str
    train: list[PairItem]
    heldout: list[PairItem]
    demonstrations: list[Item]
    demonstrations_are: str
    heldout_demonstrations: list[Item]
    pretrain: list[Item]
    prompts: list[Item]
    prompts_left_out: dict[str, int]
    eval_prompts: list[Item]
    gold: Gold | None


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads a source as tokens and says what became of its rows.

    Attributes:
        tokenizer, tokenizer_dir, gold: as in Corpus.
        options: of every load: limits, max_bad_fraction, workdir, seed.
        say: takes a line for the user.
    """

    tokenizer: Tokenizer
    tokenizer_dir: str
    gold: Gold | None
    options: dict[str, Any]
    say: Callable[[str], None]

    def __call__(self, load: Callable[..., Any], spec: str, name: str) -> list[Any]:
        rows, report = load(spec, self.tokenizer, name=name, **self.options)
        self.say(report.table())
        return rows


def of_pairs(config: Config, data: DataGroup, heldout_prompts: str, read: Reader) -> Corpus:
    """The corpus of SeRA. `data` and the file of held-out prompts are the embedded world's where there is one."""
    train = read(load_preferences, data.train, "train")
    if data.eval:
        heldout = read(load_preferences, data.eval, "eval")
    else:
        train, heldout = split_heldout(train, data.eval_fraction, config.seed)
        read.say(
            f"held out {len(heldout)} of {len(train) + len(heldout)} pairs by a hash of the prompt (data.eval is empty)"
        )
    if data.demonstrations:
        demonstrations, origin = read(load_demonstrations, data.demonstrations, "demonstrations"), "data.demonstrations"
    else:
        demonstrations, origin = [_side(pair, 0) for pair in train], "the chosen responses of data.train"
    if data.pretrain:
        pretrain = read(load_demonstrations, data.pretrain, "pretrain")
    elif data.demonstrations:
        pretrain = [as_text(item) for item in demonstrations]
    else:
        pretrain = [as_text(_side(pair, k)) for pair in train for k in (0, 1)]
    prompts = read(load_prompts, data.prompts, "prompts") if data.prompts else unique_prompts(p.item for p in train)
    eval_prompts = (
        read(load_prompts, heldout_prompts, "heldout_prompts")
        if heldout_prompts
        else unique_prompts(pair.item for pair in heldout)
    )
    return Corpus(
        tokenizer=read.tokenizer,
        tokenizer_dir=read.tokenizer_dir,
        train=flip_labels(train, data.label_noise, config.seed),
        heldout=_first(heldout, config.eval.max_pairs),
        demonstrations=demonstrations,
        demonstrations_are=origin,
        heldout_demonstrations=[],
        pretrain=pretrain,
        prompts=prompts,
        prompts_left_out={},
        eval_prompts=_first(eval_prompts, config.eval.num_prompts),
        gold=read.gold,
    )


def of_demonstrations(config: Config, data: DataGroup, heldout_prompts: str, read: Reader) -> Corpus:
    """The corpus of Self-Rewarding PPO; arguments as for `of_pairs`.

    Raises:
        ValueError: no demonstration is left, or new prompts are asked for and there are none.
    """
    demonstrations = read(load_demonstrations, data.demonstrations, "demonstrations")
    if data.eval:
        heldout = read(load_demonstrations, data.eval, "eval")
        if known := len(demonstrations) - len(_without(demonstrations, heldout)):
            read.say(f"warning: {known} demonstrations have the prompt of a held-out one; they are trained on")
    else:
        demonstrations, heldout = split_heldout(demonstrations, data.eval_fraction, config.seed)
        total = len(demonstrations) + len(heldout)
        read.say(f"held out {len(heldout)} of {total} demonstrations by a hash of the prompt (data.eval is empty)")
        if not demonstrations:
            raise ValueError(
                f"config.data.eval_fraction={data.eval_fraction} holds out all {total} demonstrations of "
                "config.data.demonstrations; lower it, or name held-out ones in config.data.eval"
            )
    if data.pretrain:
        texts = read(load_demonstrations, data.pretrain, "pretrain")
        pretrain = texts if data.eval else _without(texts, heldout)  # what was split off may stand there too
        if data.eval and (known := len(texts) - len(_without(texts, heldout))):
            read.say(f"warning: {known} pretrain texts have the prompt of a held-out one; they are trained on")
        if len(pretrain) < len(texts):
            read.say(f"pretrain: left out {len(texts) - len(pretrain)} texts with the prompt of a held-out one")
    else:
        pretrain = [as_text(item) for item in demonstrations]
    prompts, left_out = [], {}
    if data.prompts:
        prompts, left_out = new_prompts(read(load_prompts, data.prompts, "prompts"), [*demonstrations, *heldout])
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        read.say(f"new prompts: {len(prompts)} that no demonstration has (left out: {counts})")
        if config.ppo.prompt_overlap < 1 and not prompts:
            raise ValueError(
                f"config.ppo.prompt_overlap={config.ppo.prompt_overlap} takes prompts that no demonstration has, but "
                f"config.data.prompts={data.prompts!r} holds none ({counts}); name others, or set prompt_overlap=1"
            )
    heldout = _first(heldout, config.eval.max_pairs)
    eval_prompts = (
        read(load_prompts, heldout_prompts, "heldout_prompts") if heldout_prompts else unique_prompts(heldout)
    )
    return Corpus(
        tokenizer=read.tokenizer,
        tokenizer_dir=read.tokenizer_dir,
        train=[],
        heldout=[],
        demonstrations=demonstrations,
        demonstrations_are="data.demonstrations",
        heldout_demonstrations=heldout,
        pretrain=pretrain,
        prompts=prompts,
        prompts_left_out=left_out,
        eval_prompts=_first(eval_prompts, config.eval.num_prompts),
        gold=read.gold,
    )


def new_prompts(prompts: Sequence[Item], known: Sequence[Item]) -> tuple[list[Item], dict[str, int]]:
    """Those that no known item has, each once, in order; and how many were left out as `known` and as `repeated`.

    An id that a known item has, too, is changed: ids name the random draws of what is sampled.
    """
    taken, ids = {item.prompt.tobytes() for item in known}, {item.id for item in known}
    fresh = [item for item in prompts if item.prompt.tobytes() not in taken]
    once = unique_prompts(fresh)
    named = [dataclasses.replace(item, id=f"new/{item.id}") if item.id in ids else item for item in once]
    return named, {"known": len(prompts) - len(fresh), "repeated": len(fresh) - len(once)}


def as_text(item: Item) -> Item:
    """Prompt and response as one text to be modelled whole: its first token is the prompt, the rest the response."""
    rest = np.concatenate([item.prompt[1:], *item.responses]).astype(np.int32)
    return Item(item.id, item.prompt[:1], (rest,))


def _side(pair: PairItem, side: int) -> Item:
    return Item(
        f"{pair.item.id}/{'chosen' if side == 0 else 'rejected'}", pair.item.prompt, (pair.item.responses[side],)
    )


def _without(items: Sequence[Item], others: Sequence[Item]) -> list[Item]:
    """The items whose prompt none of the others has."""
    taken = {item.prompt.tobytes() for item in others}
    return [item for item in items if item.prompt.tobytes() not in taken]


def _first(items: list[Any], count: int) -> list[Any]:
    """The first `count` items; all where it is 0."""
    return items[:count] if count else items
