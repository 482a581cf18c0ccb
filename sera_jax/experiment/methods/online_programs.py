"""The programs of online DPO ahead of time. A training state stays in memory while its policy samples, and the SFT
model, which scores what was sampled, through the updates."""

from __future__ import annotations

import dataclasses

from sera_jax.aot import flops
from sera_jax.aot.programs import Program, activations, frozen_of, full_items, on_mesh, training, without
from sera_jax.aot.sampler import Use, sampler
from sera_jax.data.batches import PairLoader, score_batches
from sera_jax.data.items import PairItem
from sera_jax.data.packing import pack
from sera_jax.data.rollouts import rounded_rows
from sera_jax.experiment.methods.sera_programs import pair_scoring
from sera_jax.experiment.planned import Planned, answer_scoring, answering, sampling_programs, starting_programs
from sera_jax.loops.online import self_made
from sera_jax.loops.optimise import Training, Updates
from sera_jax.loops.restartable import Span
from sera_jax.loops.sera_study import Round, SeraStudy, pair_target, round_training, updates_of
from sera_jax.mesh import rows_sharding
from sera_jax.models.parts import merge


def online_programs(planned: Planned, study: SeraStudy, *, samples: bool, trainings: int) -> list[Program]:
    """In the order of the run.

    Args:
        samples: an arm trains on pairs of its own answers. trainings: arms that make `online.updates` updates.
    """
    given, sizes = planned.given, planned.sizes
    run, config, group = given.runtime, given.config, given.config.train
    first = round_training(study, dataclasses.replace(config.sera, rounds=1), given.start, study.pool, Round("", 1))
    out = [
        *starting_programs(planned),
        pair_scoring(planned, again="pool"),
        *training(
            run,
            dataclasses.replace(first, name="train"),
            group,
            "train",
            updates=updates_of(group, sizes.pairs) + (trainings - samples) * config.online.updates,
        ),
    ]
    if samples:
        out += _self_made(planned, study)
    return [*out, *sampling_programs(planned, [answering(planned)]), *answer_scoring(planned)]


def _self_made(planned: Planned, study: SeraStudy) -> list[Program]:
    given = planned.given
    run, config, group = given.runtime, given.config, given.config.train
    updates, source = config.online.updates, self_made(study)
    layout = run.layout.accumulated(group.gradient_accumulation_steps)
    prompt, answer = len(planned.prompt.prompt), config.sampling.max_new_tokens
    pairs = [PairItem(item) for item in full_items(group.batch_size, prompt, answer, answer)]
    loader = PairLoader(pairs, layout, batch_size=group.batch_size, seed=0, order="given")
    sft, trained = planned.models[1], run.trained(group)
    still = frozen_of(trained, sft)
    frozen = {"SFT model": without(sft, still)} if study.loss.uses_reference else {}
    own = Training(
        name="online",
        start=given.start,
        batches=lambda state, update: loader.batch(0),
        epoch_updates=1,
        depends={},
        target=pair_target(run, study.loss, source.window),
        group=group,
        updates=Updates(updates, planned=updates),
        span=Span("train"),
        trained=trained,
    )
    first_state, update = training(run, own, group, "train", updates=updates, of=sft, beside=frozen)
    state = update.arguments({})[0]
    policy = merge(state.params, still)
    beside = {**frozen, "moments": state.opt_state}
    count = config.sera.num_samples * group.batch_size
    use = Use("online: candidates", run.sampling_params(config.sampling), group.batch_size, count, updates)
    slots = min(config.sampling.slots, group.batch_size)
    piece = planned.answered(config.sera.num_samples, answer)
    pieces = [piece] * (-(-count // len(piece.responses)))
    size = rounded_rows(len(pack(pieces, layout.row_tokens, layout.share_prompt)), run.layout.shards)
    rows = score_batches(pieces, run.layout, size)[0].rows
    score = Program(
        "online: score candidates",
        run.scorer(source.window),
        lambda made: (policy, on_mesh(rows, rows_sharding(run.mesh))),
        updates * (2 if study.loss.uses_reference else 1),
        flops.forward(run.cfg, flops.of_rows(rows)),
        beside=lambda made: beside,
        working=activations(run, rows, 1) / run.cfg.num_hidden_layers,
        levers=("train.batch_size", "data.row_tokens"),
    )
    sampled = sampler(run, [use], slots=slots, longest=prompt, params=policy, beside=beside)
    return [first_state, *sampled, score, update]
