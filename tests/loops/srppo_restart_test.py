"""Self-Rewarding PPO that is killed and started again ends as a run that was not: parameters, rollouts, metrics.

The real command in a process of its own, and real signals. The reward is whitened and the KL coefficient adaptive, so
that everything which one iteration hands to the next is in play.
"""

import signal

import pytest

from sera_jax.writer import read_records
from tests.loops import kills
from tests.loops.kills import Moment, assert_same_end, finish, holding, producing, saved, signal_when, writing
from tests.loops.tiny import TINY_SRPPO, tiny_flags

LAST, EVERY = 6, 3
OVERRIDES = {
    "world.prompts": 30,
    "ppo.prompt_overlap": 0.5,
    "ppo.arms": "srppo,best_of_n",
    "ppo.best_of": 2,
    "ppo.iterations": LAST,
    "ppo.eval_iterations": EVERY,
    "ppo.kl_controller": "adaptive",
    "reward.whiten": True,
    "sampling.slots": 8,
    **{f"{group}.save_steps": 1 for group in ("pretrain", "sft", "train")},
}


def start(workdir, devices=1, **changes):
    return kills.start(tiny_flags(workdir, tiny=TINY_SRPPO, **OVERRIDES, **changes), devices)


def iterations(workdir):
    return [r["step"] for r in read_records(workdir / "metrics.jsonl")[0] if r["phase"] == "ppo"]


def logged(iteration):
    return lambda workdir: iteration in iterations(workdir)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The work directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("srppo_whole")
    code, err = finish(start(workdir))
    assert code == 0, err
    assert iterations(workdir) == list(range(1, LAST + 1))
    assert {path.name for path in (workdir / "rollouts" / "srppo").iterdir()} >= {"000001.jsonl", "000006.jsonl"}
    return workdir


def test_a_run_that_is_stopped_and_then_killed_ends_as_one_that_was_not(whole, tmp_path):
    process = start(tmp_path)
    assert signal_when(process, lambda: logged(1)(tmp_path), signal.SIGTERM)
    code, err = finish(process)
    assert code == 75, err
    assert "stopped in srppo/iteration3 after iteration" in err and "the same command goes on from there" in err
    assert "Traceback" not in err
    assert not (tmp_path / "phases" / "srppo" / "iteration3").exists()

    process = start(tmp_path)
    assert signal_when(process, (tmp_path / "checkpoints" / "srppo" / "iteration6" / "4").exists, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()

    code, err = finish(start(tmp_path))
    assert code == 0, err
    assert "\nsft: step" not in err and "round 1: step" not in err, "a finished phase was done again"
    assert_same_end(tmp_path, whole)


def amid(iteration, delay):
    """Sampling, scoring or updating in the iteration after: tens of milliseconds each, once compiled."""
    segment = f"srppo/iteration{EVERY if iteration < EVERY else LAST}"
    return Moment(logged(iteration), segment, delay)


def updating(iteration):
    """The texts of an iteration are saved between its scores and its updates; the first updates are compiled."""
    segment = f"srppo/iteration{EVERY if iteration <= EVERY else LAST}"
    return Moment(lambda workdir: (workdir / "rollouts" / "srppo" / f"{iteration:06d}.jsonl").exists(), segment)


MOMENTS = {
    "sft": saved("sft", 1),
    "evaluating the SFT model": producing("sft/generations_by_base"),
    "the first rollouts": producing("srppo/iteration3"),
    "the first updates": updating(1),
    "later updates": updating(4),
    **{f"{delay} s into iteration 2": amid(1, delay) for delay in (0.0, 0.02, 0.05, 0.1)},
    **{f"{delay} s into iteration 5": amid(4, delay) for delay in (0.0, 0.02, 0.05, 0.1)},
    "saving a checkpoint": writing("srppo/iteration3", 2),
    "a checkpoint was saved": saved("srppo/iteration3", 1),
    "writing the policy": holding("srppo/iteration3", "params"),
    "writing the state": holding("srppo/iteration3", "state"),
    "evaluation": producing("srppo/iteration3/generations"),
    "the second segment": producing("srppo/iteration6"),
    "a checkpoint of the second segment": saved("srppo/iteration6", 5),
    "candidates": producing("best_of_n/candidates"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(whole, tmp_path, moment):
    workdir = kills.killed_at(start, MOMENTS[moment], tmp_path)
    code, err = finish(start(workdir))
    assert code == 0, err
    assert_same_end(workdir, whole)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(whole, tmp_path):
    assert kills.killed_again_and_again(start, list(MOMENTS.values()), tmp_path) >= 2, "in one work directory"
    code, err = finish(start(tmp_path))
    assert code == 0, err
    assert_same_end(tmp_path, whole)


ALL_ARMS = {
    "ppo__arms": "srppo,random_reward,reinforce,ppo_reward_model,sft_equal_compute",
    "world__preferences": 24,
    "world__heldout_preferences": 12,
    "reward_model__batch_size": 8,
    "reward_model__save_steps": 1,
    "ppo__critic": "head",
    "ppo__critic_warmup_iterations": 1,
    "ppo__num_ppo_epochs": 2,
    "ppo__target_kl": 1e-3,
}


@pytest.mark.slow
def test_a_run_of_other_arms_and_options_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    code, err = finish(start(whole, **ALL_ARMS))
    assert code == 0, err
    moments = [
        saved("srppo/iteration3", 1),  # after the warm-up
        producing("srppo/iteration6"),
        saved("random_reward/iteration6", 4),
        holding("reinforce/iteration3", "params"),
        saved("reinforce/iteration6", 5),
        saved("reward_model", 2),
        producing("reward_model/answers"),
        saved("ppo_reward_model/iteration6", 4),
        saved("sft_equal_compute", 2),
    ]
    assert kills.killed_again_and_again(lambda workdir: start(workdir, **ALL_ARMS), moments, torn) >= 4
    code, err = finish(start(torn, **ALL_ARMS))
    assert code == 0, err
    assert_same_end(torn, whole)
