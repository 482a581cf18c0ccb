"""What must hold of any run, tried on a tiny copy of its model with its first rows, before anything is paid for.

An answer has the same log-prob in a packed row as alone in a padded one. An untrained policy's implicit reward is 0 and
its DPO loss log 2. A prompt begins, and an answer ends, as the tokenizer says, and nothing but answers is scored.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sera_jax.config import Config
from sera_jax.core import Stream, key_for
from sera_jax.data.batches import PairLoader, score_batches
from sera_jax.data.columns import Reading
from sera_jax.data.items import Item, PairItem
from sera_jax.data.loading import Limits, load_demonstrations, load_preferences
from sera_jax.data.packing import Layout, gather_scores, pack
from sera_jax.data.sources import parse_mixture
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.methods import METHODS
from sera_jax.experiment.planned import Planned
from sera_jax.loops.runtime import Runtime
from sera_jax.losses.preference import ResolvedLoss, resolve
from sera_jax.mesh import make_mesh
from sera_jax.models.config import LAYERWISE, ModelConfig
from sera_jax.ops.backends import AUTO
from sera_jax.training.objectives import align_objective
from sera_jax.training.parameters import load_params
from sera_jax.training.score import place_rows
from sera_jax.training.step import place_batch

ROWS = 8  # looked at
LONGEST = 256  # tokens of a prompt with its answers; longer ones would take long on a laptop
TOLERANCE = 1e-4  # nats a token, float32


@dataclasses.dataclass(frozen=True)
class Finding:
    """A law, whether it holds, and what was seen."""

    law: str
    holds: bool
    seen: str


MADE_UP = "made-up rows (the data's, or the tokenizer, are not there)"


def rehearse(planned: Planned) -> list[Finding]:
    """The laws on the first rows of the data where they and the tokenizer are there, else on made-up ones."""
    config, tokenizer = planned.given.config, planned.given.corpus.tokenizer
    items, whose = _items(config, tokenizer, planned.given.runtime.cfg.vocab_size)
    cfg = tiny(planned.given.runtime.cfg)
    mesh = make_mesh(1, 1, 1, devices=jax.devices("cpu")[:1])
    layout = Layout(2 * LONGEST, config.data.share_prompt)
    run = Runtime(cfg, mesh, None, None, config.seed, layout, 0, (0,))  # type: ignore[arg-type]
    with jax.set_mesh(mesh):
        params = load_params(cfg, mesh, key_for(config.seed, Stream.INIT))
        packed = _scores(run, params, items, layout)
        found = [_packed_is_padded(run, params, items, packed, whose)]
        if "loss" in METHODS[config.method].reads:
            pairs = [PairItem(item, ref_logp=logp) for item, logp in zip(items, packed, strict=True)]
            found += _untrained(run, params, pairs, resolve(**dataclasses.asdict(config.loss)))
    found += _only_answers(items, layout, whose)
    return found if whose == MADE_UP else found + _ends(items, tokenizer, whose)


def tiny(cfg: ModelConfig) -> ModelConfig:
    """The same kind of model, with its vocabulary, of two layers; wide at the start, so that its log-probs differ."""
    groups = min(cfg.num_attention_heads // cfg.num_key_value_heads, 4)
    return dataclasses.replace(
        cfg,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=max(1, 4 // groups),
        head_dim=8,
        initializer_range=0.3,
        dtype="float32",
        param_dtype="float32",
        logits_dtype="float32",
        remat="none",
        attn_implementation=AUTO,
        **{name: (getattr(cfg, name) * 2)[:2] for name in LAYERWISE},
    )


def _items(config: Config, tokenizer: Any, vocabulary: int) -> tuple[list[Item], str]:
    """Pairs or demonstrations, and whose rows they are."""
    kind, fields = METHODS[config.method].texts
    spec = getattr(config.data, fields[0])
    files = [path for path, _ in parse_mixture(spec, field=f"config.data.{fields[0]}")] if spec else []
    if isinstance(tokenizer, Tokenizer) and files and files[0].endswith(".jsonl") and pathlib.Path(files[0]).is_file():
        load = load_preferences if kind == "preference" else load_demonstrations
        limits = Limits(LONGEST // 4, 3 * LONGEST // 8, LONGEST, config.data.truncation_mode, config.data.share_prompt)
        with tempfile.TemporaryDirectory() as folder, open(files[0], encoding="utf-8") as lines:
            first = pathlib.Path(folder) / "first.jsonl"
            first.write_text("".join(itertools.islice(lines, ROWS)), encoding="utf-8")
            how: dict[str, Any] = dict(max_bad_fraction=config.data.max_bad_fraction, name=fields[0], seed=config.seed)
            how["reading"] = Reading(config.data.columns, config.data.thoughts, config.data.pairs)
            rows, _ = load(str(first), tokenizer, limits=limits, **how)
        return [row.item if isinstance(row, PairItem) else row for row in rows], f"the first rows of {files[0]}"
    rng = np.random.default_rng(config.seed)
    lengths = [(5, 9, 4), (12, 3, 17), (1, 1, 2), (20, 30, 7), (8, 8, 8)]
    answers = 2 if kind == "preference" else 1

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    made = [Item(str(i), tokens(p), tuple(map(tokens, rest[:answers]))) for i, (p, *rest) in enumerate(lengths)]
    return made, MADE_UP


def _scores(run: Runtime, params: Any, items: Sequence[Item], layout: Layout) -> list[np.ndarray]:
    batches = score_batches(items, layout, len(pack(items, layout.row_tokens, layout.share_prompt)))
    score = run.scorer(layout.window(items))
    return gather_scores([np.asarray(score(params, place_rows(b.rows, run.mesh))) for b in batches], batches, items)


def _packed_is_padded(
    run: Runtime, params: Any, items: Sequence[Item], packed: Sequence[np.ndarray], whose: str
) -> Finding:
    alone = [dataclasses.replace(item, responses=(response,)) for item in items for response in item.responses]
    layout = dataclasses.replace(run.layout, share_prompt=False)
    spec = score_batches(alone, layout, 1).spec
    score = run.scorer(layout.row_tokens)
    padded = [
        float(np.asarray(score(params, place_rows(score_batches([item], layout, 1, spec)[0].rows, run.mesh)))[0, 0])
        for item in alone
    ]
    lengths = np.array([len(item.responses[0]) for item in alone])
    worst = float(np.max(np.abs(np.concatenate(packed) - padded) / lengths))
    return Finding(
        "packed = padded", worst < TOLERANCE, f"log-probs differ by {worst:.1e} nats a token at most; {whose}"
    )


def _untrained(run: Runtime, params: Any, pairs: Sequence[PairItem], loss: ResolvedLoss) -> Iterator[Finding]:
    """Of a policy that is its own reference."""
    if not loss.uses_reference:
        return
    loader = PairLoader(pairs, run.layout, batch_size=len(pairs), seed=0)
    batch = loader.batch(0).arrays
    objective = align_objective(run.cfg, loss, window=run.layout.row_tokens, chunk_tokens=0, shards=1)
    micro = jax.tree.map(lambda x: x[0], place_batch(batch, 1, run.mesh))
    metrics = jax.device_get(jax.jit(objective)(params, micro)[2])
    margin = max(abs(metrics[f"rewards/{side}"].value()) for side in ("chosen", "rejected", "margins"))
    yield Finding("step-0 reward = 0", margin < 1e-3, f"mean reward {margin:.1e} of {loss}")
    if loss.name == "dpo" and not dict(loss.hyper)["nll_coef"]:
        value = metrics["loss"].value()
        yield Finding("step-0 loss = log 2", abs(value - math.log(2)) < 1e-3, f"{value:.6f}")


def _only_answers(items: Sequence[Item], layout: Layout, whose: str) -> list[Finding]:
    rows = score_batches(items, layout, len(pack(items, layout.row_tokens, layout.share_prompt)))[0].rows
    scored = np.asarray(rows.slot) < rows.num_slots
    count = sum(len(response) for item in items for response in item.responses)
    branch = np.take_along_axis(np.asarray(rows.tokens), np.minimum(rows.source + 1, rows.tokens.shape[1] - 1), axis=1)
    follows = (branch == rows.target) | (np.take_along_axis(np.asarray(rows.branch), rows.source, axis=1) == 0)
    holds = int(scored.sum()) == count and bool(follows[scored].all())
    return [Finding("answers alone are scored", holds, f"{int(scored.sum())} tokens of {count}; {whose}")]


def _ends(items: Sequence[Item], tokenizer: Tokenizer, whose: str) -> list[Finding]:
    """Of rows as the tokenizer makes them; an answer that the limits cut has no end."""
    first = [int(item.prompt[0]) == tokenizer.bos_id for item in items]
    twice = [
        len(item.prompt) > 1 and first[i] and int(item.prompt[1]) == tokenizer.bos_id for i, item in enumerate(items)
    ]
    ended = [int(response[-1]) in tokenizer.stop_ids for item in items for response in item.responses]
    bos = len(set(first)) == 1 and not any(twice)
    return [
        Finding("BOS once or never", bos, f"{sum(first)} of {len(first)} prompts begin with it, {sum(twice)} twice"),
        Finding("answers end", any(ended), f"{sum(ended)} of {len(ended)} with an end token, the others cut; {whose}"),
    ]


def said(findings: Sequence[Finding], say: Callable[[str], None]) -> bool:
    """Say each; whether all hold."""
    for one in findings:
        say(f"{'holds' if one.holds else 'DOES NOT HOLD'}: {one.law} ({one.seen})")
    return all(one.holds for one in findings)
