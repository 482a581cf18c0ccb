"""What the rounds of SeRA share: the offline pairs and their scores, how a round trains and what it leaves behind."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import irm
from sera_jax.checkpoint.phases import digest_of, write_jsonl
from sera_jax.config import SamplingGroup, SeraGroup, TrainGroup
from sera_jax.core import Stream
from sera_jax.data.batches import PairLoader
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import window_for
from sera_jax.loops.optimise import Task, optimise
from sera_jax.loops.runtime import Policy, Runtime, items_digest, row_multiple
from sera_jax.losses.preference import ResolvedLoss
from sera_jax.mesh import row_shards
from sera_jax.training.objectives import align_objective


@dataclasses.dataclass(frozen=True)
class Study:
    """What the rounds of every arm share.

    Attributes:
        pool: the offline pairs, after label noise.
        prompts: what bootstrapping samples on (items without responses).
        judge: gold reward of (prompt item, response tokens), where a world has one; only reported.
        evaluate: held-out facts of a policy, for the report; round 0 is the SFT model.
    """

    run: Runtime
    sft: Policy
    loss: ResolvedLoss
    settings: SeraGroup
    train: TrainGroup
    sampling: SamplingGroup
    pool: Sequence[PairItem]
    prompts: Sequence[Item]
    evaluate: Callable[[Policy, int], dict[str, Any]]
    judge: Callable[[Item, np.ndarray], float] | None
    max_row_shapes: int
    logging_steps: int


def pool_logps(study: Study, policy: Policy) -> list[np.ndarray]:
    """Summed log-prob of both responses of every offline pair under `policy`: f32[2] each."""
    return study.run.score(f"{policy.name}/pool", policy, [pair.item for pair in study.pool])


def pair_margins(loss: ResolvedLoss, pair: PairItem, logp: np.ndarray) -> np.ndarray:
    """Implicit reward margin (nats, no beta) of each pair of the item, f32[len(pairs)]."""
    lengths = np.array([len(r) for r in pair.item.responses])
    reward = loss.score(logp, lengths, pair.ref_logp if loss.uses_reference else None)
    return np.array([irm.margin(reward[[w]], reward[[l]])[0] for w, l in pair.pairs], np.float32)


def updates_per_round(study: Study) -> int:
    """The same in every round and arm: `max_steps`, or the epochs over the offline pairs."""
    per_epoch = -(-sum(len(pair.pairs) for pair in study.pool) // study.train.batch_size)
    return study.train.max_steps or study.train.num_train_epochs * per_epoch


def train_round(
    study: Study,
    settings: SeraGroup,
    policies: Sequence[Policy],
    pairs: Sequence[PairItem],
    name: str,
    arm: str,
    round_: int,
    ordered: bool,
) -> Policy:
    """DAA updates on `pairs`, as many in every round and every arm; `ordered` pairs are trained on as they stand."""
    run, group = study.run, study.train
    updates = updates_per_round(study)
    continues = round_ > 1 and not settings.reset_optimizer
    loader = PairLoader(
        pairs,
        batch_size=group.batch_size,
        row_tokens=run.row_tokens,
        seed=run.seed,
        stream_indices=(Stream.SHUFFLE, round_),
        row_multiple=row_multiple(group, run.mesh),
        max_row_shapes=study.max_row_shapes,
        share_prompt=run.share_prompt,
        known_sizes=run.row_shapes.sizes,
        spec=run.row_shapes.spec,
        order="given" if ordered else "shuffle",
    )
    run.row_shapes.note(loader, window_for([pair.item for pair in pairs], run.row_tokens, run.share_prompt))
    shards = row_shards(run.mesh)
    task = Task(
        name=name,
        start=policies[-1],
        loader=loader,
        window=run.row_shapes.window,
        objective=lambda window: align_objective(
            run.cfg, study.loss, window=window, chunk_tokens=run.chunk_tokens, shards=shards
        ),
        computes=(str(study.loss), run.chunk_tokens),
        group=group,
        updates=updates,
        schedule_updates=updates if settings.reset_optimizer else updates * settings.rounds,
        depends={"pairs": pairs_digest(pairs), "seed": run.seed, "row_tokens": run.row_tokens},
        continue_from=policies[-1] if continues else None,
        updates_before=updates * (round_ - 1) if continues else 0,
        log=("train", "" if round_ == 1 else arm, round_),
        logging_steps=study.logging_steps,
    )
    return optimise(run, task)


def with_reference(
    study: Study, settings: SeraGroup, policies: Sequence[Policy], pairs: Sequence[PairItem], round_: int
) -> list[PairItem]:
    """The pairs with the reference log-probs that training uses: of the SFT model (they carry those already), or, with
    reference="previous", of the last round's policy."""
    if settings.reference == "fixed" or not study.loss.uses_reference or round_ == 1:
        return list(pairs)
    items = [pair.item for pair in pairs]
    name = f"{policies[-1].name}/pairs_{pairs_digest(pairs)[:12]}"
    logps = study.run.score(name, policies[-1], items)
    return [dataclasses.replace(pair, ref_logp=logp) for pair, logp in zip(pairs, logps, strict=True)]


def save_pairs(study: Study, name: str, kept: np.ndarray, margins: np.ndarray, fresh: Sequence[PairItem]) -> None:
    """What a round decided, for readers and as a check on restarts: every offline pair's margin and whether it is kept,
    and the tokens of the sampled pairs."""

    def produce(folder: pathlib.Path) -> None:
        keep = set(kept.tolist())
        offline = zip(study.pool, margins.tolist(), strict=True)
        write_jsonl(
            folder / "offline.jsonl",
            ({"id": p.item.id, "margin": m, "kept": i in keep} for i, (p, m) in enumerate(offline)),
        )
        write_jsonl(
            folder / "sampled.jsonl",
            (
                {
                    "id": p.item.id,
                    "prompt": p.item.prompt.tolist(),
                    "chosen": p.item.responses[w].tolist(),
                    "rejected": p.item.responses[l].tolist(),
                }
                for p in fresh
                for w, l in p.pairs
            ),
        )

    inputs = {"margins": margins.tobytes().hex(), "kept": kept.tolist(), "sampled": pairs_digest(fresh)}
    study.run.workdir.phase(name, {"digest": digest_of(inputs)}, produce)


def pairs_digest(pairs: Sequence[PairItem]) -> str:
    """Digest of what training on the pairs depends on, their order included."""
    rest = [[p.pairs, p.weight, None if p.ref_logp is None else np.asarray(p.ref_logp).tolist()] for p in pairs]
    return digest_of([items_digest([p.item for p in pairs]), rest])
