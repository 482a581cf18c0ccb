"""PPO from one evaluation to the next: a phase of the work directory, restartable at any iteration."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from sera_jax import memory
from sera_jax.checkpoint import Checkpoints, load_tree, save_tree
from sera_jax.checkpoint.phases import write_json
from sera_jax.loops.ppo import Learner
from sera_jax.loops.runtime import Policy, Preempted, items_digest
from sera_jax.models.critic import HEAD, without_value_head
from sera_jax.training.ppo_steps import PpoState

Iterate = Callable[[Learner, PpoState, int], tuple[PpoState, dict[str, Any]]]


def train_segment(
    learner: Learner, iterate: Iterate, *, previous: Policy, first: int, last: int, round_: int
) -> tuple[Policy, dict[str, float]]:
    """Iterations `first` to `last` from where `previous` ended (or, at first=1, from the SFT model).

    Returns:
        The policy, and what all iterations so far cost: `passes_tokens`.

    Raises:
        Preempted: when asked to stop; a checkpoint was saved. Else as the verbs of `Learner`.
    """
    study, arm = learner.study, learner.arm
    inputs = {
        "arm": arm,
        "iterations": [first, last],
        "policies": [policy.digest for policy in (previous, study.sft, study.base)],
        "groups": [dataclasses.asdict(group) for group in (study.ppo, study.reward, study.train, study.sampling)],
        "prompts": [items_digest(learner.schedule.sft), items_digest(learner.schedule.new)],
        "seed": study.run.seed,
        "rows": [study.run.row_tokens, study.run.share_prompt],
    }
    name = f"{arm}/iteration{last}"
    product = study.run.workdir.phase(
        name, inputs, lambda folder: _produce(folder, learner, iterate, name, previous, first, last, round_)
    )
    return Policy(name, product.path, product.digest), product.json("spent.json")


def _produce(
    folder: pathlib.Path,
    learner: Learner,
    iterate: Iterate,
    name: str,
    previous: Policy,
    first: int,
    last: int,
    round_: int,
) -> None:
    run, group = learner.study.run, learner.study.train
    checkpoints = Checkpoints(run.workdir.checkpoints(name), group.save_total_limit)
    try:
        state = checkpoints.restore(learner.programs.abstract)
        if state is None:
            state = _state_after(learner, previous) if first > 1 else learner.programs.start(run.params(previous))
        run.release()
        memory.trim(cycles=True)
        state = _train(learner, iterate, state, checkpoints, name, last, round_)
    finally:
        checkpoints.close()
        learner.release()
    save_tree(folder / "params", without_value_head(state.policy.params))
    save_tree(folder / "state", _rest(state))
    write_json(folder / "spent.json", {"passes_tokens": float(jax.device_get(state.control.passes_tokens))})


def _train(
    learner: Learner,
    iterate: Iterate,
    state: PpoState,
    checkpoints: Checkpoints,
    name: str,
    last: int,
    round_: int,
) -> PpoState:
    run, group = learner.study.run, learner.study.train
    done = int(jax.device_get(state.control.iteration))
    below = 0
    with run.writer.phase("ppo", arm=learner.arm, round=round_, total_steps=last, start_step=done):
        for iteration in range(done + 1, last + 1):
            try:
                after, metrics = iterate(learner, state, iteration)
            except Preempted:  # while sampling: the state before this iteration is whole
                _save(learner, checkpoints, iteration - 1, state)
                raise Preempted(f"stopped in {name} after iteration {iteration - 1}; {_GOES_ON}") from None
            except ValueError:
                if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):  # refused before any update
                    _save(learner, checkpoints, iteration - 1, state)
                raise
            state = after
            below = below + 1 if metrics["objective/kl"] < 0 else 0
            if below == _BELOW_ZERO:
                run.writer.announce(
                    f"warning: objective/kl has been below 0 for {below} iterations, as no KL is: rollouts are not of "
                    "the policy that is scored, or k1 is too noisy for so few responses (see objective/kl_k3)"
                )
            tokens = int(metrics["rollout/tokens"])
            run.writer.write(step=iteration, metrics=metrics | learner.timings(), tokens=tokens)
            stop = run.stop_requested() and iteration < last
            if stop or (group.save_steps > 0 and iteration % group.save_steps == 0 and iteration < last):
                _save(learner, checkpoints, iteration, state)
            if stop:
                raise Preempted(f"stopped in {name} after iteration {iteration}; {_GOES_ON}")
        run.writer.sync()
    return state


_BELOW_ZERO = 10  # iterations in a row with a negative estimate of the KL, after which a warning is due
_GOES_ON = "the same command goes on from there"


def _save(learner: Learner, checkpoints: Checkpoints, iteration: int, state: PpoState) -> None:
    if checkpoints.latest_step() != iteration:
        learner.study.run.writer.sync()  # the metrics of an iteration are on disk before its checkpoint is
        checkpoints.save(iteration, state)


def _rest(state: PpoState) -> PpoState:
    """The state without the policy's own parameters, which are saved beside it; a value head on them stays."""
    heads = {key: leaf for key, leaf in state.policy.params.items() if key == HEAD}
    return dataclasses.replace(state, policy=dataclasses.replace(state.policy, params=heads))


def _state_after(learner: Learner, previous: Policy) -> PpoState:
    """The state that the segment of `previous` ended with."""
    abstract = learner.programs.abstract
    rest = load_tree(previous.path / "state", _rest(abstract))
    params = load_tree(previous.path / "params", without_value_head(abstract.policy.params))
    return dataclasses.replace(rest, policy=dataclasses.replace(rest.policy, params={**params, **rest.policy.params}))
