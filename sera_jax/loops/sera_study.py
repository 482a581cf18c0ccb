"""What the rounds of SeRA share: the offline pairs and their scores, how a round trains and what it leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import irm
from sera_jax.checkpoint.papers import digest_of, write_jsonl
from sera_jax.config import SamplingGroup, SeraGroup, TrainGroup
from sera_jax.core import Stream
from sera_jax.data import stored
from sera_jax.data.batches import PairLoader
from sera_jax.data.items import Item, PairItem, items_digest
from sera_jax.data.packing import Scores
from sera_jax.data.stored import Pairs, id_of, items_of, pair_counts, trained_on
from sera_jax.loops import shapes
from sera_jax.loops.log import warn_of_still_margins
from sera_jax.loops.optimise import Target, Training, Updates, optimise
from sera_jax.loops.restartable import Span
from sera_jax.loops.rewards import Reward
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.losses.preference import ResolvedLoss
from sera_jax.mesh import row_shards
from sera_jax.training.objectives import align_objective

_AT_ONCE = 4096  # pairs that are hashed at a time
Gold = Callable[[Item, np.ndarray], float]  # the reward of (prompt item, response tokens); NaN where there is none


@dataclasses.dataclass(frozen=True)
class SeraStudy:
    """What the rounds of every arm share.

    Attributes:
        pool: the offline pairs, after label noise.
        prompts: what bootstrapping samples on (items without responses).
        ranking: what orders a prompt's candidates.
        text: what response tokens say, control tokens left out.
        evaluate: held-out facts of a policy, for the report; round 0 is the SFT model.
        gold: only reported, unless it is the judge.
        own_loss: the loss is that of one arm alone, and so is its round 1.
    """

    run: Runtime
    sft: Policy
    loss: ResolvedLoss
    settings: SeraGroup
    train: TrainGroup
    sampling: SamplingGroup
    pool: Sequence[PairItem]
    prompts: Sequence[Item]
    ranking: Reward
    text: Callable[[np.ndarray], str]
    evaluate: Callable[[Policy, int], dict[str, Any]]
    gold: Gold | None
    own_loss: bool = False


def pool_logps(study: SeraStudy, policy: Policy) -> Scores:
    """Summed log-prob of both responses of every offline pair under `policy`: f32[2] each."""
    return study.run.score(f"{policy.name}/pool", policy, items_of(study.pool))


def pair_margins(loss: ResolvedLoss, pair: PairItem, logp: np.ndarray) -> np.ndarray:
    """Implicit reward margin (nats, no beta) of each pair of the item, f32[len(pairs)]."""
    lengths = np.array([len(r) for r in pair.item.responses])
    reward = loss.score(logp, lengths, pair.ref_logp if loss.uses_reference else None)
    return np.array([irm.margin(reward[[w]], reward[[l]])[0] for w, l in pair.pairs], np.float32)


def pool_margins(loss: ResolvedLoss, pool: Sequence[PairItem], logps: Scores) -> np.ndarray:
    """The margin of the first pair of every entry, f32[n]."""
    if not isinstance(pool, Pairs):
        return np.array([pair_margins(loss, pair, logp)[0] for pair, logp in zip(pool, logps, strict=True)])
    lengths = pool.items.lengths().responses.reshape(-1, 2)
    reward = pool.first_choice(loss.score(np.asarray(logps), lengths, pool.ref_logp if loss.uses_reference else None))
    return irm.margin(reward[:, 0], reward[:, 1]).astype(np.float32)


def updates_per_round(study: SeraStudy) -> int:
    """The same in every round and arm: `max_steps`, or the epochs over the offline pairs."""
    return updates_of(study.train, int(pair_counts(study.pool).sum()))


def updates_of(group: TrainGroup, entries: int) -> int:
    """Of a training on so many entries (pairs, demonstrations): `max_steps`, or its epochs over them."""
    return group.max_steps or group.num_train_epochs * -(-entries // group.batch_size)


@dataclasses.dataclass(frozen=True)
class Round:
    """Which round of which arm: `name` is the phase that trains it, and the policy that comes out.

    Round 1, which is the same in every arm, belongs to none, but for an arm that has its `own`.
    """

    arm: str
    number: int
    own: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}/round{self.number}" if self._of_arm else "round1"

    @property
    def reference_phase(self) -> str:
        return f"{self.arm}/reference{self.number}"

    def span(self, updates: int) -> Span:
        """Of so many updates a round."""
        return Span("train", self.arm if self._of_arm else "", self.number, updates * (self.number - 1))

    @property
    def _of_arm(self) -> bool:
        return self.own or self.number > 1


def train_round(
    study: SeraStudy,
    settings: SeraGroup,
    before: Policy,
    pairs: Sequence[PairItem],
    round_: Round,
    *,
    ordered: bool = False,
) -> Policy:
    """DAA updates on `pairs`, as many in every round and every arm; `ordered` pairs are trained on as they stand."""
    run, training = study.run, round_training(study, settings, before, pairs, round_, ordered=ordered)
    looked_at = training.name in run.workdir.done  # by another arm, whose round 1 is the same
    policy = optimise(run, training)
    assert training.shapes is not None
    run.pair_shapes.known = shapes.read(policy.path) or training.shapes()
    if training.name in run.workdir.fresh and not looked_at:
        warn_of_still_margins(run, training.span, study.loss, study.train.learning_rate)
    return policy


def round_training(
    study: SeraStudy,
    settings: SeraGroup,
    before: Policy,
    pairs: Sequence[PairItem],
    round_: Round,
    *,
    ordered: bool = False,
) -> Training:
    """What `train_round` does, not yet done."""
    run, group = study.run, study.train
    updates = updates_per_round(study)
    continues = round_.number > 1 and not settings.reset_optimizer
    loader = PairLoader(
        pairs,
        run.layout.accumulated(group.gradient_accumulation_steps),
        batch_size=group.batch_size,
        seed=run.seed,
        stream_indices=(Stream.SHUFFLE, round_.number),
        known=run.pair_shapes.known,
        order="given" if ordered else "shuffle",
    )
    run.pair_shapes.window = max(run.pair_shapes.window, run.layout.window(items_of(pairs)))
    return Training(
        name=round_.name,
        start=before,
        batches=lambda state, update: loader.batch(update - 1),
        epoch_updates=loader.steps_per_epoch,
        depends={"pairs": pairs_digest(pairs), "seed": run.seed, "row_tokens": run.layout.row_tokens},
        target=pair_target(run, study.loss, run.pair_shapes.window),
        group=group,
        trained=run.trained(group),
        updates=Updates(
            updates,
            planned=updates if settings.reset_optimizer else updates * settings.rounds,
            before=updates * (round_.number - 1) if continues else 0,
        ),
        continue_from=before if continues else None,
        last_of=before if round_.number > (1 if round_.own else 2) else None,  # round 1 is of all arms
        span=round_.span(updates),
        shapes=lambda: loader.shapes,
    )


def pair_target(run: Runtime, loss: ResolvedLoss, window: int) -> Target:
    """The direct alignment loss of pairs of at most `window` tokens."""
    shards, chunk = row_shards(run.mesh), run.chunk_tokens
    return Target(
        computes=(str(loss), chunk),
        window=window,
        make=lambda: align_objective(run.cfg, loss, window=window, chunk_tokens=chunk, shards=shards),
    )


def with_reference(
    study: SeraStudy, settings: SeraGroup, policies: Sequence[Policy], pairs: Sequence[PairItem], round_: Round
) -> Sequence[PairItem]:
    """The pairs with the reference log-probs that training uses: of the SFT model (they carry those already), or, with
    reference="previous", of the last round's policy."""
    if settings.reference == "fixed" or not study.loss.uses_reference or round_.number == 1:
        return pairs
    return stored.with_reference(pairs, study.run.score(round_.reference_phase, policies[-1], items_of(pairs)))


def save_pairs(study: SeraStudy, name: str, kept: np.ndarray, margins: np.ndarray, fresh: Sequence[PairItem]) -> None:
    """What a round decided, for readers and as a check on restarts: every offline pair's margin and whether it is kept,
    and the tokens of the sampled pairs."""

    def produce(folder: pathlib.Path) -> None:
        keep = set(kept.tolist())
        items = items_of(study.pool)
        write_jsonl(
            folder / "offline.jsonl",
            ({"id": id_of(items, i), "margin": m, "kept": i in keep} for i, m in enumerate(margins.tolist())),
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
    digest, first = hashlib.sha256(), True
    digest.update(f'["{items_digest(items_of(pairs))}", ['.encode())
    for start in range(0, len(pairs), _AT_ONCE):  # as digest_of gives it of both in a list
        rest = trained_on(pairs[start : start + _AT_ONCE])
        digest.update(("" if first else ", ").encode() + json.dumps(rest)[1:-1].encode())
        first = False
    digest.update(b"]]")
    return digest.hexdigest()
