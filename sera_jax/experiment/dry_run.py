"""What a run would read and train on, with nothing done: no work directory, no device, no weights.

Rows are read by `assembly.read_corpus`, as a run reads them, with its tokenizer or the one that it would train; which
tokens are trained on is taken of packed rows. Of models the config is enough. `dry_run_report` shows the facts.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import config as config_lib
from sera_jax.aot import flops
from sera_jax.aot.chips import GPUS, TPUS
from sera_jax.checkpoint import Workdir
from sera_jax.checkpoint.code import check_versions, history_of
from sera_jax.checkpoint.lock import has_results
from sera_jax.checkpoint.papers import plain, read_json
from sera_jax.checkpoint.phases import check_config
from sera_jax.config import Config
from sera_jax.data import lengths
from sera_jax.data import repository as data_sets
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import build_rows, laid_tokens, spec_for
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment import brought, overlaps
from sera_jax.experiment.assembly import check_positions, check_shape, check_sources, model_shape, read_corpus
from sera_jax.experiment.corpus import Corpus, Reader
from sera_jax.experiment.ends import end_ids, ends_in_words
from sera_jax.experiment.method import Trains
from sera_jax.experiment.methods import METHODS
from sera_jax.experiment.needs import batches_in_words, parameter_count
from sera_jax.experiment.parts import with_adapters
from sera_jax.experiment.start import phases as start_phases
from sera_jax.loops.runtime import Preempted
from sera_jax.loops.sera_study import updates_of
from sera_jax.models.config import ModelConfig

Facts = dict[str, Any]
ROWS = 2  # of each training that are shown
CHIPS = {"h100": GPUS["h100"], "v5e": TPUS["v5e"]}
PEAK = 0.4  # share of a chip's peak that is assumed, as `preflight` does


def look(
    config: Config,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    allow_other_versions: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Facts:
    """All that is known before a run of `config`, JSON-able.

    Args:
        stop_requested: asked before each source.
        allow_other_versions: as of `experiment.run`.
        say: takes a line on what is downloaded.

    Raises:
        ValueError: what a run would refuse of the config, the work directory, the rows or the tokenizer.
        Preempted: stopped on request.
    """
    root = pathlib.Path(config.workdir)
    notes = _check_workdir(config, root, allow_other_versions)
    method = METHODS[config.method]
    notes.append(method.announce(config))
    found = brought.survey(config, root)
    config = found.config
    notes += [f"{name}: commit {commit}" for name, commit in found.commits.items()]
    check_sources(config.data, config.model)
    for rows in found.rows:
        data_sets.fetch(rows, say)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Workdir(pathlib.Path(folder), config_lib.to_dict(config))
        sources: list[Facts] = []
        reader = functools.partial(_Noting, sources=sources, stop_requested=stop_requested)
        corpus = read_corpus(config, workdir, notes.append, reader)
        looked = read_json(workdir.root / "data" / overlaps.RECORD)["facts"]
        said = [overlaps.in_words(looked, group) for group in overlaps.groups(looked)]
        notes = [line for line in notes if line not in said]  # they are shown with examples
        facts = _facts(config, corpus, sources, notes) | {"contamination": looked}
    return _renamed(facts, folder, config.workdir)


@dataclasses.dataclass(frozen=True)
class _Noting(Reader):
    """A reader that keeps what the report on each source says, in place of saying it, and how long its rows are."""

    sources: list[Facts] = dataclasses.field(default_factory=list)
    stop_requested: Callable[[], bool] = lambda: False

    def __call__(self, load: Callable[..., Any], spec: str, name: str) -> list[Any]:
        if self.stop_requested():
            raise Preempted("stopped; a dry run leaves nothing behind")
        measured = lengths.Measured(self.tokenizer)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Reader)}
        rows = Reader(**fields | {"tokenizer": measured, "say": lambda text: None})(load, spec, name)
        limits, report = self.options["limits"], read_json(self.options["workdir"] / "data" / f"{name}.json")
        table = measured.table(limits.max_prompt_length, limits.max_completion_length)
        self.sources.append(report | {"lengths": table})
        return rows


def _check_workdir(config: Config, root: pathlib.Path, allowed: bool) -> list[str]:
    """Refuse the work directory where a run would, without touching it; lines on what may differ."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"config.workdir={config.workdir!r} is no folder; choose another --config.workdir")
    if not has_results(root):
        return []
    there = {name: value for name, value in config_lib.to_dict(config).items() if name != "workdir"}
    notes = check_config(root, plain(there))
    history = history_of(read_json(root / "versions.json"))
    return [*notes, *check_versions(root, history, allowed)]


def _facts(config: Config, corpus: Corpus, sources: list[Facts], notes: list[str]) -> Facts:
    cfg = model_shape(config.model, corpus.tokenizer)
    check_positions(config, cfg)
    cfg, lora = with_adapters(config, cfg)
    if config.model.sft_model_path:
        check_shape(config.model, cfg)
    ends = end_ids(corpus.tokenizer, config.model.sft_model_path, config.model.model_name_or_path)
    show = Shown(corpus.tokenizer, ends, config.data.share_prompt)
    method = METHODS[config.method]
    trainings = [*_started_with(config, corpus), *method.trains(config, corpus)]
    new = [all(other.entries is not one.entries for other in trainings[:i]) for i, one in enumerate(trainings)]
    names = {*start_phases(config), *method.phases(config, corpus)}
    return {
        "method": config.method,
        "workdir": config.workdir,
        "notes": [*notes, ends_in_words(corpus.tokenizer, ends), *batches_in_words(config, corpus)],
        "truncation_mode": config.data.truncation_mode,
        "sources": sources,
        "trainings": [
            _training(config, cfg, lora is not None, one) | ({"first": show.first(one.entries)} if is_new else {})
            for one, is_new in zip(trainings, new, strict=True)
        ],
        "held_out": {
            "rows": len(corpus.heldout) or len(corpus.heldout_demonstrations),
            "prompts": len(corpus.eval_prompts),
            "left_out": corpus.held_out_rows,
        },
        "prompts": len(corpus.prompts),
        "phases": sorted(names),
        "model": {"parameters": parameter_count(cfg), "vocabulary": cfg.vocab_size},
        "assumed": {"share_of_peak": PEAK, "chips": {name: chip.flops for name, chip in CHIPS.items()}},
    }


def _started_with(config: Config, corpus: Corpus) -> list[Trains]:
    """The trainings before the method's own."""
    out = []
    if "pretrain" in start_phases(config):
        updates = updates_of(config.pretrain, len(corpus.pretrain))
        out.append(Trains("base model", "pretrain", corpus.pretrain, updates))
    if not config.model.sft_model_path:
        out.append(Trains("SFT", "sft", corpus.demonstrations, updates_of(config.sft, len(corpus.demonstrations))))
    return out


def _training(config: Config, cfg: ModelConfig, adapters: bool, one: Trains) -> Facts:
    """How many updates of what, and what they cost."""
    batch = getattr(config, one.group).batch_size
    facts: Facts = {
        "what": one.what,
        "group": one.group,
        "entries": len(one.entries),
        "batch_size": batch,
        "updates": one.updates,
        "times": one.times,
    }
    if not one.entries:
        return facts
    count = sum(len(entry.pairs) if isinstance(entry, PairItem) else 1 for entry in one.entries)
    items = [entry.item if isinstance(entry, PairItem) else entry for entry in one.entries]
    seen = one.updates * one.times * min(batch, count) / count  # times that every entry is seen
    of_all = tokens_of(items)
    spent = flops.update(cfg, of_all.times(seen), adapters=adapters and one.group != "pretrain")
    return facts | {
        "tokens": int(of_all.number),
        "trained_tokens": int(of_all.scored),
        "flops": spent,
        "seconds": {name: spent / (PEAK * chip.flops) for name, chip in CHIPS.items()},
    }


def tokens_of(items: Sequence[Item]) -> flops.Tokens:
    """Of items whose responses share their prompt, as `flops.of_rows` counts them."""
    prompt = np.array([len(item.prompt) for item in items], np.float64)
    owner = np.repeat(np.arange(len(items)), [len(item.responses) for item in items])
    response = np.array([len(response) for item in items for response in item.responses], np.float64)
    keys = (prompt * (prompt + 1) / 2).sum() + (response * prompt[owner] + response * (response + 1) / 2).sum()
    return flops.Tokens(float(prompt.sum() + response.sum()), float(keys), float(response.sum()))


@dataclasses.dataclass(frozen=True)
class Shown:
    """Shows entries token by token: `tokenizer` says what they are, `ends` what ends an answer."""

    tokenizer: Tokenizer
    ends: Sequence[int]
    share_prompt: bool

    def first(self, entries: Sequence[Item | PairItem]) -> list[Facts]:
        return [self.entry(entry) for entry in entries[:ROWS]]

    def entry(self, entry: Item | PairItem) -> Facts:
        """The prompt and the answers: text with control tokens, ids, pieces, which tokens are trained on."""
        item = entry.item if isinstance(entry, PairItem) else entry
        names = ["response"]
        if isinstance(entry, PairItem):
            (chosen, _), *_ = entry.pairs
            names = ["chosen" if k == chosen else "rejected" for k in range(len(item.responses))]
        prompt, *answers = trained_on(item, self.share_prompt)
        parts = [self._part("prompt", item.prompt, prompt)]
        for name, tokens, mask in zip(names, item.responses, answers, strict=True):
            end = int(tokens[-1])
            parts.append(self._part(name, tokens, mask) | {"end": self._names[end] if end in self.ends else None})
        return {"id": item.id, "flipped": isinstance(entry, PairItem) and entry.flipped, "parts": parts}

    def _part(self, name: str, tokens: np.ndarray, mask: np.ndarray) -> Facts:
        ids = tokens.tolist()
        return {
            "name": name,
            "tokens": len(ids),
            "trained": int(mask.sum()),
            "text": self.text(ids),
            "ids": ids,
            "pieces": [self._names[id] for id in ids],
            "mask": mask.astype(int).tolist(),
        }

    def text(self, ids: Sequence[int]) -> str:
        """Decoded, control tokens by their names."""
        out, plain_ids = [], []
        for id in ids:
            if self.tokenizer.decode([id]):
                plain_ids.append(id)
                continue
            out += [self.tokenizer.decode(plain_ids), self._names[id]]
            plain_ids = []
        return "".join([*out, self.tokenizer.decode(plain_ids)])

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return {id: token for token, id in self.tokenizer.vocabulary().items()}


def trained_on(item: Item, share_prompt: bool = True) -> list[np.ndarray]:
    """bool[n] of the prompt, then of each response: tokens whose log-probs are in a loss, as the item's row says."""
    length = laid_tokens(item, share_prompt)
    rows = build_rows([item], [[0]], spec_for([item], [[0]], length), 1, share_prompt).rows
    scored = np.asarray(rows.slot)[0] < rows.num_slots
    source, target, slot = (np.asarray(part)[0][scored] for part in (rows.source, rows.target, rows.slot))
    masks = [np.zeros(len(part), bool) for part in (item.prompt, *item.responses)]
    places = np.asarray(rows.positions)[0][source] + 1
    for k, place, token in zip(slot.tolist(), places.tolist(), target.tolist(), strict=True):
        part, at = (k + 1, place - len(item.prompt)) if place >= len(item.prompt) else (0, place)
        assert [item.prompt, *item.responses][part][at] == token, "a row says what its item says"
        masks[part][at] = True
    return masks


def _renamed(value: Any, folder: str, name: str) -> Any:
    """The facts with the work directory's name in place of the folder that stood for it."""
    if isinstance(value, str):
        return value.replace(folder, name)
    if isinstance(value, dict):
        return {_renamed(key, folder, name): _renamed(part, folder, name) for key, part in value.items()}
    return [_renamed(part, folder, name) for part in value] if isinstance(value, list | tuple) else value
