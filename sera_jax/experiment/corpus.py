"""What a run reads, by method: preference pairs for SeRA, demonstrations and new prompts for Self-Rewarding PPO.

One rule for every method: a prompt that is held out, split off by data.eval_fraction or named in data.eval, stands in
no training source. Its rows there are left out, counted, and said in a line for each source. The held-out pairs of a
reward model judge that alone: their prompts are new to it and to SFT, and PPO may sample on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from sera_jax.checkpoint import Workdir
from sera_jax.checkpoint.addressed import addressed
from sera_jax.config import Config, DataGroup
from sera_jax.data import keeping
from sera_jax.data.items import Item, PairItem, unique_prompts
from sera_jax.data.loading import (
    flip_labels,
    load_demonstrations,
    load_preferences,
    load_pretrain,
    load_prompts,
    split_heldout,
)
from sera_jax.data.sources import content_hash, parse_mixture
from sera_jax.data.stored import Items, Pairs, chosen_from, id_of, items_of, keys_of, known
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.evaluation.gold import OfText
from sera_jax.loops.sera_study import Gold

Entry = TypeVar("Entry", Item, PairItem)


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
        held_out_rows: how many rows of each training source were left out because their prompt is held out.
        eval_prompts: what held-out generations answer. eval_tasks: the task of each, in the embedded world.
        gold: reward of (prompt item, response tokens): the embedded world's, or by eval.gold; NaN of a prompt that has
            none.
        contamination: how many held-out and benchmark prompts stand in what is trained on (`overlaps.counts`).
        reward_pairs, heldout_reward_pairs: what the reward model of SRPPO's arm is trained on, after label noise, and
            judged by, clean; both empty without that arm.
    """

    tokenizer: Tokenizer
    tokenizer_dir: str
    train: Sequence[PairItem]
    heldout: Sequence[PairItem]
    demonstrations: Sequence[Item]
    demonstrations_are: str
    heldout_demonstrations: Sequence[Item]
    pretrain: Sequence[Item]
    prompts: Sequence[Item]
    prompts_left_out: dict[str, int]
    eval_prompts: Sequence[Item]
    gold: Gold | None
    held_out_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    contamination: dict[str, Any] = dataclasses.field(default_factory=dict)
    eval_tasks: list[str] = dataclasses.field(default_factory=list)
    reward_pairs: Sequence[PairItem] = ()
    heldout_reward_pairs: Sequence[PairItem] = ()


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads a source as tokens and says what became of its rows.

    Attributes:
        tokenizer, tokenizer_dir: as in Corpus.
        gold: the embedded world's. gold_of_text: what eval.gold names.
        options: of every load: limits, max_bad_fraction, workdir, seed, reading.
        say: takes a line for the user.
        workdir: where tokens are kept.
    """

    tokenizer: Tokenizer
    tokenizer_dir: str
    gold: Gold | None
    gold_of_text: OfText | None
    options: dict[str, Any]
    say: Callable[[str], None]
    workdir: Workdir

    def __call__(self, load: Callable[..., Any], spec: str, name: str) -> Sequence[Any]:
        """The source's entries, tokenized once and kept (`keeping`), and the table of what became of its rows.

        Raises:
            ValueError: a source that cannot be opened. TooManyBadRows: it cannot be used as it is.
        """
        kind = {load_preferences: 2, load_prompts: 0}.get(load, 1)
        mixture = parse_mixture(spec, field=f"config.data.{name}")
        names = [path for path, _ in mixture]
        inputs = {
            "read": load.__name__,
            "contents": [content_hash(path, field=f"config.data.{name}") for path, _ in mixture],
            "weights": [[weight, pathlib.PurePath(path).name if weight % 1 else ""] for path, weight in mixture],
            "shares_by": self.options["seed"] if any(weight % 1 for _, weight in mixture) else None,
            "limits": dataclasses.asdict(self.options["limits"]),
            "reading": dataclasses.asdict(self.options["reading"]),
            "tokenizer": self.tokenizer.fingerprint(),
            **keeping.decided_by(),
        }

        def produce(folder: pathlib.Path) -> None:
            how = {**self.options, "name": name}
            keeping.keep(folder, kind, names, lambda into: load(spec, self.tokenizer, into=into, **how)[1])

        items, report = keeping.kept(addressed(self.workdir, name, inputs, produce).path, spec, names)
        report.finish(self.options["max_bad_fraction"], self.options["workdir"])
        self.say(report.table())
        return Pairs(items) if kind == 2 else items

    def gold_of(self, preferred: Iterable[Item], prompts: Sequence[Item]) -> Gold | None:
        """The gold reward of a run: the embedded world's, or what `eval.gold` names. Where that compares an answer with
        the preferred ones of its prompt, a prompt without one has none (NaN).

        Args:
            preferred: prompts with their preferred answers. prompts: what is sampled on in training; how many of them
                have no preferred answer is said.
        """
        reward = self.gold_of_text
        if reward is None:
            return self.gold
        references: dict[bytes, list[str]] = {}
        for item in preferred:
            said = [self.tokenizer.decode_response(tokens) for tokens in item.responses]
            references.setdefault(item.prompt.tobytes(), []).extend(said)
        without = sum(item.prompt.tobytes() not in references for item in prompts)
        if without and reward.compares:
            self.say(f"gold: {without} of {len(prompts)} prompts have no preferred answer, and so no gold reward")

        def gold(item: Item, tokens: np.ndarray) -> float:
            known = references.get(item.prompt.tobytes(), ())
            if reward.compares and not known:
                return math.nan
            return reward.of(self.tokenizer.decode_response(tokens), known)

        return gold


@dataclasses.dataclass
class HeldOut:
    """What is held out, and what that takes from the training sources.

    Attributes:
        rows: of the main source's kind. prompts: what held-out generations answer.
        left_out: rows of each training source whose prompt is held out.
    """

    rows: list[Any]
    prompts: Sequence[Item]
    say: Callable[[str], None]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keys = keys_of(self.rows) | keys_of(self.prompts)

    def keep_out(self, entries: Sequence[Entry], source: str) -> Sequence[Entry]:
        """The entries of data.`source` whose prompt is not held out; how many have one that is, is counted and said.

        Raises:
            ValueError: none is left.
        """
        held = self._keys
        if source == "prompts":  # nor is an answer sampled to what a held-out conversation begins with
            held = held | {key for entry in [*self.rows, *self.prompts] for key in _item_of(entry).openings}
        kept = chosen_from(entries, np.flatnonzero(~known(entries, held)))
        self.left_out[source] = len(entries) - len(kept)
        if self.left_out[source]:
            self.say(f"{source}: left out {self.left_out[source]} of {len(entries)} rows, whose prompts are held out")
        if entries and not kept:
            raise ValueError(
                f"config.data.{source}: the prompts of all {len(entries)} rows are held out; name others there, or "
                "hold fewer out by config.data.eval or config.data.eval_fraction"
            )
        return kept


def main_source(
    data: DataGroup, heldout_prompts: str, read: Reader, load: Callable[..., Any], source: str
) -> tuple[Sequence[Any], HeldOut]:
    """The rows of data.`source` that are trained on, and what is held out: the rows of data.eval, or of a share of the
    source's prompts. `heldout_prompts`: a file of further prompts that are held out, to be answered; "" for none.

    Raises:
        ValueError: no row is left.
    """
    rows = read(load, getattr(data, source), source)
    if data.eval:
        heldout = read(load, data.eval, "eval")
    else:
        total = len(rows)
        rows, heldout = split_heldout(rows, data.eval_fraction, data.split_seed)
        what = "pairs" if source == "train" else source
        read.say(f"held out {len(heldout)} of {total} {what} by a hash of the prompt (data.eval is empty)")
        if not rows:
            raise ValueError(
                f"config.data.eval_fraction={data.eval_fraction} holds out all {total} {what} of config.data.{source}; "
                "lower it, or name held-out ones in config.data.eval"
            )
    if heldout_prompts:
        prompts = read(load_prompts, heldout_prompts, "heldout_prompts")
    else:
        prompts = unique_prompts(_items_of(heldout))
    held = HeldOut(heldout, prompts, read.say)
    return held.keep_out(rows, source), held


def of_pairs(config: Config, data: DataGroup, heldout_prompts: str, read: Reader) -> Corpus:
    """The corpus of SeRA. `data` and the file of held-out prompts are the embedded world's where there is one.

    Raises:
        ValueError: nothing is left of a source.
    """
    train, held = main_source(data, heldout_prompts, read, load_preferences, "train")
    noisy = flip_labels(train, data.label_noise, config.seed)
    if data.demonstrations:
        demonstrations = held.keep_out(
            read(load_demonstrations, data.demonstrations, "demonstrations"), "demonstrations"
        )
        origin = "data.demonstrations"
    else:
        demonstrations = _preferred(noisy)
        origin = "the chosen responses of data.train" + (", after label noise" if data.label_noise else "")
    if data.pretrain:
        pretrain = held.keep_out(read(load_pretrain, data.pretrain, "pretrain"), "pretrain")
    elif data.demonstrations:
        pretrain = as_texts(demonstrations)
    else:
        pretrain = as_texts(_both_sides(train))  # the same base whatever the noise
    if data.prompts:
        prompts = held.keep_out(read(load_prompts, data.prompts, "prompts"), "prompts")
    else:
        prompts = unique_prompts(items_of(train))
    return Corpus(
        tokenizer=read.tokenizer,
        tokenizer_dir=read.tokenizer_dir,
        train=noisy,
        heldout=_first(held.rows, config.eval.max_pairs),
        demonstrations=demonstrations,
        demonstrations_are=origin,
        heldout_demonstrations=[],
        pretrain=pretrain,
        prompts=prompts,
        prompts_left_out={},
        eval_prompts=_first(held.prompts, config.eval.num_prompts),
        gold=read.gold_of(itertools.chain(_preferred(train), _preferred(held.rows)), prompts),
        held_out_rows=held.left_out,
    )


def of_demonstrations(
    config: Config, data: DataGroup, heldout_prompts: str, read: Reader, *, with_pairs: bool = False
) -> Corpus:
    """The corpus of Self-Rewarding PPO; arguments as for `of_pairs`.

    Args:
        with_pairs: an arm trains a reward model.

    Raises:
        ValueError: nothing is left of a source, or new prompts are asked for and there are none.
    """
    demonstrations, held = main_source(data, heldout_prompts, read, load_demonstrations, "demonstrations")
    if data.pretrain:
        pretrain = held.keep_out(read(load_pretrain, data.pretrain, "pretrain"), "pretrain")
    else:
        pretrain = as_texts(demonstrations)
    pairs, heldout_pairs = _reward_pairs(config, data, demonstrations, held, read) if with_pairs else ([], [])
    prompts, left_out = [], {}
    if data.prompts:
        given = held.keep_out(read(load_prompts, data.prompts, "prompts"), "prompts")
        prompts, left_out = new_prompts(given, demonstrations, held.rows)
        left_out["known"] += held.left_out["prompts"]
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        read.say(f"new prompts: {len(prompts)} that no demonstration has (left out: {counts})")
        if config.ppo.prompt_overlap < 1 and not prompts:
            raise ValueError(
                f"config.ppo.prompt_overlap={config.ppo.prompt_overlap} takes prompts that no demonstration has, but "
                f"config.data.prompts={data.prompts!r} holds none ({counts}); name others, or set prompt_overlap=1"
            )
    return Corpus(
        tokenizer=read.tokenizer,
        tokenizer_dir=read.tokenizer_dir,
        train=[],
        heldout=[],
        demonstrations=demonstrations,
        demonstrations_are="data.demonstrations",
        heldout_demonstrations=_first(held.rows, config.eval.max_pairs),
        pretrain=pretrain,
        prompts=prompts,
        prompts_left_out=left_out,
        eval_prompts=_first(held.prompts, config.eval.num_prompts),
        gold=read.gold_of(itertools.chain(demonstrations, held.rows), prompts),
        held_out_rows=held.left_out,
        reward_pairs=pairs,
        heldout_reward_pairs=heldout_pairs,
    )


def _reward_pairs(
    config: Config, data: DataGroup, demonstrations: Sequence[Item], held: HeldOut, read: Reader
) -> tuple[Sequence[PairItem], Sequence[PairItem]]:
    """Pairs for a reward model, after label noise, and held-out ones: those of the embedded world, which lie beside its
    pairs, or of a share of the pairs' own prompts. The model is started from the SFT model, so a prompt that has a
    demonstration is not among the held-out ones.

    Raises:
        ValueError: no pair is left.
    """
    pairs = read(load_preferences, data.train, "train")
    if config.world.name:
        beside = str(pathlib.Path(data.train).with_name("heldout_preferences.jsonl"))
        heldout = read(load_preferences, beside, "heldout_preferences") if config.world.heldout_preferences else []
    else:
        total = len(pairs)
        _, split = split_heldout(pairs, data.eval_fraction, data.split_seed)
        heldout = chosen_from(split, np.flatnonzero(~known(split, keys_of(demonstrations))))
        pairs = chosen_from(pairs, np.flatnonzero(~known(pairs, keys_of(heldout))))
        read.say(
            f"held out {len(heldout)} of {total} pairs for the reward model, by a hash of the prompt, of prompts that "
            "no demonstration has"
        )
    pairs = held.keep_out(pairs, "train")
    if not pairs:
        raise ValueError(
            f"config.data.train={data.train!r} leaves no pair for the reward model of ppo_reward_model; name more, or "
            f"lower config.data.eval_fraction={data.eval_fraction}"
        )
    return flip_labels(pairs, data.label_noise, config.seed), _first(heldout, config.eval.max_pairs)


def new_prompts(prompts: Sequence[Item], *demonstrated: Sequence[Item]) -> tuple[Sequence[Item], dict[str, int]]:
    """Those that no demonstrated item has, each once, in order; and how many were left out as `known` and as
    `repeated`.

    An id that a demonstrated item has, too, is changed: ids name the random draws of what is sampled.
    """
    taken = set[str | bytes]().union(*map(keys_of, demonstrated))
    ids = {id_of(items, i) for items in demonstrated for i in range(len(items))}
    fresh = chosen_from(prompts, np.flatnonzero(~known(prompts, taken)))
    once = unique_prompts(fresh)
    again = np.array([id_of(once, i) in ids for i in range(len(once))], bool)
    if isinstance(once, Items):
        named = once.renamed(again)
    else:
        named = [dataclasses.replace(item, id=f"new/{item.id}") if a else item for item, a in zip(once, again)]
    return named, {"known": len(prompts) - len(fresh), "repeated": len(fresh) - len(once)}


def as_texts(items: Sequence[Item]) -> Sequence[Item]:
    """`as_text` of each."""
    return items.as_texts() if isinstance(items, Items) else list(map(as_text, items))


def as_text(item: Item) -> Item:
    """Prompt and response as one text to be modelled whole: its first token is the prompt, the rest the response."""
    rest = np.concatenate([item.prompt[1:], *item.responses]).astype(np.int32)
    return dataclasses.replace(item, prompt=item.prompt[:1], responses=(rest,))


def _preferred(pairs: Pairs) -> Items:
    """The chosen response of each pair, named as its row named it."""
    return pairs.items.with_side(np.arange(len(pairs)), pairs.preferred())


def _both_sides(pairs: Pairs) -> Items:
    """Both responses of each pair, one after the other."""
    count = len(pairs)
    return pairs.items.with_side(np.repeat(np.arange(count), 2), np.tile(np.array([0, 1], np.int8), count))


def _items_of(entries: Sequence[Any]) -> Sequence[Item]:
    return items_of(entries) if isinstance(entries, Pairs) else entries


def _item_of(entry: Item | PairItem) -> Item:
    return entry.item if isinstance(entry, PairItem) else entry


def _first(items: Sequence[Any], count: int) -> Sequence[Any]:
    """The first `count` items; all where it is 0, none where it is -1."""
    return items[: max(count, 0)] if count else items
