"""A tiny run of Self-Rewarding PPO with every arm, and what its loops saw; and a way to run one arm with changes."""

import copy
import dataclasses
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from sera_jax import experiment
from sera_jax.checkpoint import Workdir
from sera_jax.config import Config
from sera_jax.experiment.methods import srppo as srppo_method
from sera_jax.loops.ppo import Learner
from sera_jax.loops.ppo_segment import Segment, train_segment
from sera_jax.loops.runtime import Policy
from sera_jax.loops.srppo import RANDOM_REWARD, REINFORCE, SRPPO_ARM, iterate, srppo
from sera_jax.loops.srppo_study import PpoArm, SrppoStudy
from sera_jax.mesh import make_mesh, row_shards
from sera_jax.training.ppo_steps import PpoPrograms, PpoState
from sera_jax.writer import MetricWriter, read_records
from tests.loops.tiny import tiny_srppo

ARMS = ("srppo", "sft_longer", "best_of_n", "random_reward", "reinforce", "sft_equal_compute")
PPO_ARMS = {arm.name: arm for arm in (SRPPO_ARM, RANDOM_REWARD, REINFORCE)}
ITERATIONS, EVERY, MINI_BATCHES = 4, 2, 2
GROUPS = ("ppo", "reward", "train", "sampling")


class Seen(NamedTuple):
    """An iteration from within. `scored` by minibatch on the host; `experience` leaves are [A, R / A, ...]."""

    rollouts: Any
    scored: list[dict[str, Any]]
    experience: list[Any]
    metrics: dict[str, float]


class Lab(NamedTuple):
    """A finished run, what its loops were given, and what they saw by (arm, iteration)."""

    config: Config
    summary: dict[str, Any]
    study: SrppoStudy
    root: pathlib.Path
    seen: dict[tuple[str, int], Seen]

    def policy(self, name):
        return Policy(name, self.root / "phases" / name, name)

    def lines(self, arm):
        return ppo_lines(self.root, arm)


def run(root: pathlib.Path) -> Lab:
    """All arms, on half old and half new prompts, so that every source of prompts is used."""
    config = tiny_srppo(
        root,
        world__prompts=30,
        ppo__prompt_overlap=0.5,
        ppo__arms=ARMS,
        ppo__iterations=ITERATIONS,
        ppo__eval_iterations=EVERY,
        ppo__num_mini_batches=MINI_BATCHES,
        ppo__best_of=3,
        sampling__slots=8,  # fewer than responses, so that a look between two calls of the decoder comes amid sampling
        log__rollout_iterations=2,
    )
    studies, seen = [], {}

    def spy(study, arm):
        studies.append(study)
        return srppo(study, arm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", one_device)
        patch.setattr(srppo_method, "srppo", spy)
        watch(patch, seen)
        summary = experiment.run(config)
    return Lab(config, summary, studies[0], root, seen)


def one_device(*_):
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def watch(patch, seen):
    """From now on, every iteration's rollouts, scores and experience are kept in `seen`."""
    reward = Learner.reward

    def watched(self, state, rollouts, scored, iteration):
        host = jax.device_get(list(scored))
        after, experience, metrics = reward(self, state, rollouts, scored, iteration)
        seen[self.arm.name, iteration] = Seen(rollouts, host, jax.device_get(list(experience)), metrics)
        return after, experience, metrics

    patch.setattr(Learner, "reward", watched)


def study_of(lab: Lab, folder: pathlib.Path, *, mesh=None, sft=None, layout=None, **changes) -> SrppoStudy:
    """The lab's study in a work directory of its own, with other settings.

    Args:
        mesh: another mesh. sft: another SFT model. layout: other fields of the rows' layout.
        changes: fields of groups, as `ppo__critic="head"`.
    """
    run = copy.copy(lab.study.run)
    run.workdir, run.writer = Workdir(folder, {}), MetricWriter(folder, tensorboard=False)
    run._held = None
    # PPO's programs are compiled for settings, which may be others here
    run._compiled = {} if mesh is not None else {k: v for k, v in run._compiled.items() if k[0] != "ppo"}
    run.layout = dataclasses.replace(run.layout, **(layout or {}))
    if mesh is not None:
        run.mesh, run.layout = mesh, dataclasses.replace(run.layout, shards=row_shards(mesh))
    groups = {group: getattr(lab.study, group) for group in GROUPS}
    for name, value in changes.items():
        group, field = name.split("__")
        groups[group] = dataclasses.replace(groups[group], **{field: value})
    return dataclasses.replace(lab.study, run=run, sft=sft or lab.study.sft, evaluate=lambda *_: {}, **groups)


def run_arm(study: SrppoStudy, arm: str = "srppo", ends: tuple[int, ...] = ()) -> Policy:
    """Stage 3; with `ends` only the segments that end with these iterations.

    The number of iterations is a constant of the compiled updates, by the schedule of the rate: with `ends` a short run
    shares the programs of the lab's in the compile cache.
    """
    with jax.set_mesh(study.run.mesh), study.run.writer:
        if not ends:
            return srppo(study, PPO_ARMS[arm])[0]
        learner, policy = Learner(study, PPO_ARMS[arm]), study.sft
        for round_, (before, last) in enumerate(itertools.pairwise((0, *ends)), 1):
            policy, _ = train_segment(learner, iterate, Segment(before + 1, last, round_), policy)
        return policy


def first_rewards(
    study: SrppoStudy, arm: PpoArm = SRPPO_ARM
) -> tuple[dict[str, float], list[Any], PpoState, PpoPrograms]:
    """Metrics, experience and state of the first iteration before its updates, and the arm's programs."""
    with jax.set_mesh(study.run.mesh), study.run.writer:
        learner = Learner(study, arm)
        state = learner.programs.start(study.run.params(study.sft))
        rollouts = learner.sample(state, 1)
        state, experience, metrics = learner.reward(state, rollouts, learner.score(state, rollouts), 1)
    return metrics, list(experience), state, learner.programs


def ppo_lines(root, arm):
    """The metrics of an arm's iterations."""
    return [r for r in read_records(root / "metrics.jsonl")[0] if (r["phase"], r["arm"]) == ("ppo", arm)]


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def checksums(policy):
    return json.loads((policy.path / "params" / "checksums.json").read_text())


def responses_of(rollouts):
    """(prompt, response) tokens of every response, in order."""
    return [(i.prompt.tolist(), r.tolist()) for i in rollouts.items for r in i.responses]


def by_response(seen: Seen, values):
    """Sum over each response's tokens of `values[part]` f[R, M]: {(item, response): sum}, in float64."""
    out = {}
    for part, value in zip(seen.rollouts.parts, values, strict=True):
        for r, k in np.argwhere(part.item >= 0):
            here = part.rows.slot[r] == k
            out[int(part.item[r, k]), int(part.response[r, k])] = float(np.float64(value)[r, here].sum())
    return out


def log_ratios(seen: Seen):
    """log pi_sft - log pi_base of every response, nats, from its tokens' scores; one response to a prompt."""
    sums = by_response(seen, [part["sft_logp"] - part["base_logp"] for part in seen.scored])
    return np.array([sums[i, 0] for i in range(len(seen.rollouts.items))])


def lengths_of(seen: Seen):
    return np.array([len(r) for item in seen.rollouts.items for r in item.responses])


def finished_of(seen: Seen):
    return np.array([sample.finished for group in seen.rollouts.samples for sample in group])
