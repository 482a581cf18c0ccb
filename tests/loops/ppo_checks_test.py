"""What stops Self-Rewarding PPO, and what is counted: a refusal names the value, the limit and the way out."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import pytest

from sera_jax import experiment, main
from sera_jax.checkpoint import Workdir
from sera_jax.config import PpoGroup, RewardGroup, to_config_dict, to_dict
from sera_jax.core import Stream, rng_for
from sera_jax.experiment.assembly import read_corpus
from sera_jax.experiment.methods import parse
from sera_jax.loops import ppo_checks, ppo_segment
from sera_jax.loops import srppo as srppo_loop
from sera_jax.loops.ppo import Learner
from sera_jax.loops.ppo_checks import CLIPPED, STALLED, Watch, check_rewards
from sera_jax.loops.runtime import NonFinite, Preempted
from sera_jax.loops.srppo import SRPPO_ARM, iterate
from sera_jax.writer import read_records
from tests.loops.flags import set_flags
from tests.loops.srppo_lab import EVERY, MINI_BATCHES, checksums, one_device, ppo_lines, run_arm, study_of
from tests.loops.tiny import tiny_srppo

FINE = {
    "coherent_reward/mean": 0.5,
    "coherent_reward/largest": 0.1,
    "objective/kl": 1.0,
    "objective/rlhf_reward": 0.4,
    "rollout/decode_score_gap": 1e-6,
}


@pytest.fixture
def command(capsys):
    """The command with a ConfigDict in place of its flags: (exit code, standard error)."""

    def run(raw):
        root = pathlib.Path(raw.workdir)
        if (root / "phases").exists():  # made by a run of another config: as if by one of this
            shutil.move(root / "phases", root / "aside")
            workdir = Workdir(root, to_dict(parse(raw)))
            workdir.begin()
            workdir._lock.close()
            shutil.move(root / "aside", root / "phases")
        with pytest.MonkeyPatch.context() as patch:
            set_flags(patch, raw)
            patch.setattr(experiment, "make_mesh", one_device)
            with pytest.raises(SystemExit) as stopped:
                main.main(["main"])
        return stopped.value.code, capsys.readouterr().err

    return run


def with_phases(lab, folder, *names):
    """A work directory in which these phases of the lab are done; a flattened config of the lab's fields there."""
    for name in names:
        shutil.copytree(lab.root / "phases" / name, folder / "phases" / name)
    raw = to_config_dict(lab.config)
    raw.workdir = str(folder)
    return raw


def refused(code, err, *words):
    assert code == 2
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [word for word in words if word not in message] == []


def test_an_sft_that_moved_nothing_is_refused_before_any_rollout(lab, tmp_path, command):
    raw = with_phases(lab, tmp_path, "world", "init", "pretrain")
    raw.sft.learning_rate = 1e-30
    code, err = command(raw)
    refused(code, err, "the SFT model equals the base", "config.sft.learning_rate=1e-30", "raise the rate")
    assert "pretrain: step" not in err, "a phase that was done is found again"
    assert not (tmp_path / "rollouts").exists()


def test_a_loss_that_is_not_finite_stops_the_command_with_the_way_out(lab, tmp_path, command):
    raw = with_phases(lab, tmp_path, "world", "init", "pretrain", "sft")
    raw.train.learning_rate, raw.ppo.arms = 1e30, ("srppo",)
    code, err = command(raw)
    refused(
        code, err, "srppo, iteration 1: the loss or gradient of the policy is not finite", "(1e+30)", "--config.wor"
    )
    assert ppo_lines(tmp_path, "srppo") == []
    assert not (tmp_path / "phases" / "srppo" / "iteration2").exists()
    assert not (tmp_path / "summary.json").exists()


def test_what_the_config_rules_out_is_an_error_of_the_command(lab, tmp_path, command):
    raw = with_phases(lab, tmp_path)
    raw.sampling.temperature = 0.7
    refused(*command(raw), "config.sampling.temperature=0.7", "set temperature=1")
    raw.sampling.temperature, raw.train.batch_size = 1.0, 15
    refused(*command(raw), "config.train.batch_size=15", "use a multiple of 2")
    raw.train.batch_size, raw.world.prompts = 16, 0
    refused(*command(raw), "config.ppo.prompt_overlap=0.5", "config.world.prompts=0", "set prompt_overlap=1")
    assert list(tmp_path.iterdir()) == [], "nothing is made before the config is read"


def test_prompts_longer_than_the_limit_are_counted_on_screen_and_on_disk(tmp_path):
    said, limit = [], 8
    config = tiny_srppo(
        tmp_path,
        world__prompts=30,
        ppo__prompt_overlap=0.5,
        data__max_prompt_length=limit,
        data__truncation_mode="drop",
    )
    corpus = read_corpus(config, Workdir(tmp_path, {}), said.append)
    for name, items in (("demonstrations", corpus.demonstrations), ("prompts", corpus.prompts)):
        report = json.loads((tmp_path / "data" / f"{name}.json").read_text())
        dropped = report["dropped"]["prompt_too_long"]
        assert 0 < dropped["count"] < report["rows"] == report["kept"] + dropped["count"]
        assert f"at most {limit}" in dropped["detail"]
        (table,) = [text for text in said if text.startswith(f"{name}: ")]
        assert f"{dropped['count']}  prompt_too_long" in table
        assert max(len(item.prompt) for item in items) <= limit


def test_a_policy_that_runs_away_stops_the_run(lab, tmp_path):
    study = study_of(lab, tmp_path, ppo__max_kl=0.01, train__learning_rate=0.03)
    with pytest.raises(
        ValueError, match=r"srppo, iteration \d: objective/kl=.* exceeds config\.ppo\.max_kl=0\.01"
    ) as said:
        run_arm(study)
    for way_out in ("raise config.ppo.kl_coef (0.05)", "lower config.train.learning_rate", "new --config.workdir"):
        assert way_out in str(said.value)
    steps = [r["step"] for r in read_records(tmp_path / "metrics.jsonl")[0]]
    assert steps and f"iteration {steps[-1] + 1}:" in str(said.value), "the iterations before are in the log"
    with pytest.raises(ValueError) as again:  # the same command again says the same
        run_arm(study_of(lab, tmp_path, ppo__max_kl=0.01, train__learning_rate=0.03))
    assert str(again.value) == str(said.value)


def test_a_sampler_that_disagrees_with_the_scorer_stops_the_run(lab, tmp_path):
    with pytest.raises(
        ValueError, match=r"iteration 1: .* config\.ppo\.max_decode_score_gap=1e-12; use config\.model\.dtype=float32"
    ):
        run_arm(study_of(lab, tmp_path, ppo__max_decode_score_gap=1e-12), ends=(1,))
    assert ppo_lines(tmp_path, "srppo") == []


def test_a_reward_of_nothing_is_refused_and_one_of_something_is_not(lab):
    ppo = lab.config.ppo
    check_rewards(FINE, ppo, "srppo, iteration 1")
    with pytest.raises(ValueError, match=r"srppo, iteration 1: .* 0 for every token: the SFT model equals the base"):
        check_rewards(FINE | {"coherent_reward/largest": 0.0, "coherent_reward/mean": 0.0}, ppo, "srppo, iteration 1")
    check_rewards(FINE | {"coherent_reward/mean": 0.0}, ppo, "a mean of 0 says nothing")


@pytest.mark.parametrize("name", [name for name in FINE if name != "coherent_reward/largest"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_named(lab, name, value):
    with pytest.raises(NonFinite, match=rf"reinforce, iteration 3: {name} is {value}; .* new --config\.workdir"):
        check_rewards(FINE | {name: value}, lab.config.ppo, "reinforce, iteration 3")


@pytest.mark.parametrize(
    "name, field", [("objective/kl", "max_kl"), ("rollout/decode_score_gap", "max_decode_score_gap")]
)
def test_at_its_limit_a_run_goes_on_and_beyond_it_stops(lab, name, field):
    limit = getattr(lab.config.ppo, field)
    check_rewards(FINE | {name: limit}, lab.config.ppo, "srppo, iteration 2")
    with pytest.raises(ValueError, match=rf"config\.ppo\.{field}={limit}"):
        check_rewards(FINE | {name: 1.01 * limit}, lab.config.ppo, "srppo, iteration 2")


def test_a_kl_estimate_that_stays_below_0_is_warned_of_once(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ppo_checks, "BELOW_ZERO", 2)
    study = study_of(lab, tmp_path)

    def odd(learner, state, iteration):
        state, metrics = iterate(learner, state, iteration)
        return state, metrics | {"objective/kl": -0.5}

    with jax.set_mesh(study.run.mesh), study.run.writer:
        learner = Learner(study, SRPPO_ARM)
        ppo_segment.train_segment(learner, odd, ppo_segment.Segment(1, 3, 1), study.sft)
    assert capsys.readouterr().err.count("warning: objective/kl has been below 0 for 2 iterations") == 1


def watch_of(ppo=None, reward=None):
    return Watch(ppo or PpoGroup(), reward or RewardGroup(), learning_rate=1e-9)


def said(watch, **metrics):
    """What a watch says after iterations with these numbers of one metric, the others being fine."""
    (name,) = metrics
    name, numbers = name.replace("__", "/"), metrics[name]
    fine = FINE | {"objective/kl_k3": 1.0}
    return [watch.warnings(fine | {name: number}, i) for i, number in enumerate(numbers, 1)]


def test_a_critic_that_is_held_back_is_warned_of_after_its_warm_up():
    watch = watch_of(PpoGroup(cliprange_value=0.2, value_scale="none", critic_warmup_iterations=2))
    over = CLIPPED + 0.1
    *quiet, (warning,), after = said(watch, val__clipfrac_avg=[over] * (2 + STALLED + 1))
    assert not any(quiet) and not after
    for word in ("val/clipfrac_avg", "config.ppo.cliprange_value=0.2", "value_scale=none", "cliprange_value=None"):
        assert word in warning
    watch = watch_of()
    assert not any(said(watch, val__clipfrac_avg=[over, over, CLIPPED] * 4)), "not in a row, or not above"


def test_answers_that_score_less_than_the_penalty_of_a_cut_one_are_warned_of_and_counted():
    watch = watch_of(PpoGroup(iterations=4), RewardGroup(missing_eos_penalty=3.0))
    first, (warning,), *more = said(watch, objective__finished_scores=[-3.0, -3.5, -2.0, -4.0])
    assert not first and not any(more), "once"
    for word in ("iteration 2", "score -3.5 on average", "less than the -3 ", "missing_eos=subtract", "_penalty"):
        assert word in warning
    *evaluations, end = map(watch.at_evaluation, (2, 3, 4))
    assert not any(evaluations) and end == ["warning: PPO was paid for running on in 2 of 4 iterations"]
    for rule in ("subtract", "keep"):
        watch = watch_of(PpoGroup(iterations=3), RewardGroup(missing_eos=rule))
        assert not any(said(watch, objective__finished_scores=[-9.0] * 3)) and not watch.at_evaluation(3)


def test_a_kl_that_stays_at_0_is_said_at_an_evaluation():
    watch = watch_of()
    assert not any(said(watch, objective__kl_k3=[0.0, None, 1e-9, 4e-9]))
    (line,) = watch.at_evaluation(4)
    assert line.startswith("warning: iteration 4, at 1e-09: the KL to the SFT model stayed at 0 (never above 4e-09 ")
    assert "config.train.learning_rate" in line


@pytest.mark.parametrize(
    ("kls", "warmup"),
    [
        ([0.0, 1e-4, 1e-3, 1e-2], 0),
        ([0.0, 1e-9, 1e-9], 0),  # too few to say: the first is of the SFT model itself
        ([0.0] * 6, 3),  # the critic warms up, and the first update shows in iteration 5
    ],
)
def test_a_kl_that_moves_or_cannot_have_moved_yet_is_not_said(kls, warmup):
    watch = watch_of(PpoGroup(critic_warmup_iterations=warmup))
    assert not any(said(watch, objective__kl_k3=kls)) and not watch.at_evaluation(len(kls))


def test_warnings_go_on_over_segments_and_stops(lab, tmp_path, monkeypatch, capsys):
    """Segments of an iteration, the third by another process that goes on from a checkpoint: as from one long one."""
    monkeypatch.setattr(ppo_checks, "BELOW_ZERO", 3)
    odd_ones = {"objective/kl": -0.5, "objective/kl_k3": 1e-9, "objective/finished_scores": -99.0}
    stop = []

    def odd(learner, state, iteration):
        state, metrics = iterate(learner, state, iteration)
        stop.append(iteration == 3)
        return state, metrics | odd_ones

    monkeypatch.setattr(srppo_loop, "iterate", odd)
    segments = [ppo_segment.Segment(1, 1, 1), ppo_segment.Segment(2, 2, 2)]
    monkeypatch.setattr(srppo_loop, "segments", lambda ppo: segments)
    study = study_of(lab, tmp_path, reward__missing_eos="penalty")
    run_arm(study)
    study.run.workdir._lock.close()
    first = capsys.readouterr().err
    assert "warning" in first and "objective/kl has" not in first and "stayed at 0" not in first
    segments.append(ppo_segment.Segment(3, 4, 3))
    study = study_of(lab, tmp_path, reward__missing_eos="penalty")
    study.run.stop_requested = lambda: stop[-1]
    with pytest.raises(Preempted):
        run_arm(study)
    study.run.workdir._lock.close()
    second = capsys.readouterr().err
    assert second.count("warning: objective/kl has been below 0 for 3 iterations") == second.count("warning") == 1
    run_arm(study_of(lab, tmp_path, reward__missing_eos="penalty"))
    third = capsys.readouterr().err
    assert "paid for running on in 4 of 4 iterations" in third
    assert "iteration 4, at" in third and third.count("warning") == 2


def poison_the_last_update(patch, iteration):
    """From now on the advantages of the last minibatch of this iteration are nan; the updates before are made."""
    reward = Learner.reward

    def poisoned(self, state, rollouts, scored, number):
        state, experience, metrics = reward(self, state, rollouts, scored, number)
        if number == iteration:
            rng = rng_for(self.study.run.seed, Stream.SHUFFLE, int(Stream.PROMPTS), iteration, 0)
            last = rng.permutation(len(experience))[-1]
            experience[last] = dataclasses.replace(experience[last], advantage=experience[last].advantage * math.nan)
        return state, experience, metrics

    patch.setattr(Learner, "reward", poisoned)


def test_an_iteration_that_is_not_finite_leaves_the_state_before_it(lab, tmp_path):
    """A fault that does not come again: the same command goes on as if nothing had been."""
    assert MINI_BATCHES > 1 and lab.study.train.save_steps > EVERY
    with pytest.MonkeyPatch.context() as patch:
        poison_the_last_update(patch, EVERY)
        for _ in range(2):  # the same command again says the same
            with pytest.raises(
                NonFinite,
                match=rf"srppo, iteration {EVERY}: .* of the policy is not finite.* before the iteration is s",
            ):
                run_arm(study_of(lab, tmp_path), ends=(EVERY,))
            folder = tmp_path / "checkpoints" / "srppo" / f"iteration{EVERY}"
            assert [path.name for path in folder.iterdir() if path.name.isdigit()] == [f"{EVERY - 1}"]
    policy, undisturbed = run_arm(study_of(lab, tmp_path), ends=(EVERY,)), lab.policy(f"srppo/iteration{EVERY}")
    assert checksums(policy) == checksums(undisturbed)
    # the critic, the optimisers, the moments of scores and returns
    states = [json.loads((p.path / "state" / "checksums.json").read_text()) for p in (policy, undisturbed)]
    assert states[0] == states[1] and any("returns" in name for name in states[0])


def test_a_state_too_large_to_be_kept_twice_is_not_and_the_message_says_what_there_is(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_segment, "SPARE_BYTES", 0)
    poison_the_last_update(monkeypatch, EVERY)
    for save_steps, newest in ((0, "none"), (1, f"iteration {EVERY - 1}")):
        study = study_of(lab, tmp_path / newest, train__save_steps=save_steps)
        with pytest.raises(NonFinite, match=rf"Newest checkpoint of srppo/iteration{EVERY}: {newest}$"):
            run_arm(study, ends=(EVERY,))
