"""The phases of a run are counted before the first begins, and the count is right: for every method, arm and restart.

Whole runs on the embedded world, in which everything is as it is but the arithmetic: log-probs and answers are drawn.
"""

import json
import re
import zlib
from typing import Any

import numpy as np
import pytest

from sera_jax import experiment
from sera_jax.checkpoint import phases as made
from sera_jax.experiment import start
from sera_jax.experiment.methods.online_dpo import ARMS as ONLINE_ARMS
from sera_jax.experiment.methods.sera import ARMS as SERA_ARMS
from sera_jax.experiment.methods.sera import NOISE_AWARE, _updates
from sera_jax.experiment.methods.srppo import ARMS as SRPPO_ARMS
from sera_jax.experiment.phases import Phases, in_words
from sera_jax.loops import optimise, ppo_segment
from sera_jax.loops.restartable import Ended
from sera_jax.loops.runtime import Preempted, Runtime
from sera_jax.sampling import Sample
from tests.loops.tiny import TINY, TINY_SRPPO, tiny_config

SMALL = {"world.pretrain": 8, "world.preferences": 12, "world.heldout_preferences": 4, "world.heldout_prompts": 4}
SERA = TINY | SMALL | {"sera.rounds": 3, "sera.arms": tuple(SERA_ARMS)}
SRPPO = TINY_SRPPO | SMALL | {"world.prompts": 10}
SRPPO |= {"world.heldout_demonstrations": 4, "ppo.prompt_overlap": 0.5, "ppo.arms": tuple(SRPPO_ARMS)}
ONLINE = TINY | SMALL | {"method": "online_dpo", "online.arms": tuple(ONLINE_ARMS), "online.updates": 5}
CASES: dict[str, dict[str, Any]] = {
    "sera, all arms": SERA,
    "sera, one round": SERA | {"sera.rounds": 1},
    "sera, daa": SERA | {"sera.arms": ("daa",)},
    "sera, bootstrap_only": SERA | {"sera.arms": ("bootstrap_only",)},
    "sera, reference of the last round": SERA | {"sera.reference": "previous"},
    "sera, without a reference": SERA
    | {
        "loss.name": "simpo",
        "sera.reference": "previous",
        "sera.arms": tuple(a for a in SERA_ARMS if a not in NOISE_AWARE),
    },
    "sera, without a reference, its KL watched": SERA
    | {"loss.name": "simpo", "sera.arms": ("sera", "sft_likelier_of_4"), "sera.stop_kl": 1e9},
    "sera, too few pairs to add any": SERA | {"sera.bootstrap_fraction": 0.01},
    "sera, within its guard rails": SERA
    | {"sera.arms": ("sera", "sft_likelier_of_4"), "sera.support_quantile": 0.3, "sera.agreement": "rewards"},
    "sera, at several temperatures": SERA | {"sera.arms": ("sera", "daa"), "eval.temperatures": (0.0, 0.5, 1.0)},
    "srppo, at several temperatures": SRPPO | {"eval.temperatures": (0.0, 0.5, 1.0), "world.heldout_tasks": ("last",)},
    "online, at several temperatures": ONLINE | {"eval.temperatures": (0.0, 0.5), "online.eval_updates": 2},
    "srppo, all arms": SRPPO,
    "srppo, best_of_n": SRPPO | {"ppo.arms": ("best_of_n",)},
    "srppo, a reward model without held-out pairs": SRPPO
    | {"ppo.arms": ("ppo_reward_model",), "world.heldout_preferences": 0},
    "srppo, greedy answers": SRPPO | {"eval.temperature": 0.0},
    "srppo, evaluated at the end": SRPPO | {"ppo.eval_iterations": 0},
    "online": ONLINE,
    "online, evaluated on the way": ONLINE | {"online.eval_updates": 2},
}


@pytest.fixture
def pretended(monkeypatch):
    """No model computes: each phase writes drawn numbers, by its name. Setting `stop_at` stops that phase."""
    state = {"stop_at": None}

    def rng(name):
        if name == state["stop_at"]:
            raise Preempted(f"stopped in {name}")
        return np.random.default_rng(zlib.crc32(name.encode()))

    def score(self, folder, name, policy, items, inputs):
        np.save(folder / "logps.npy", rng(name).normal(size=sum(len(item.responses) for item in items)))

    def generate(self, policy, prompts, num_samples, settings, **_):
        draw, ends = rng(f"{policy}/generations" if num_samples == 1 else f"{policy}/candidates"), self.stop_ids[0]
        tokens = lambda: np.array([*draw.integers(5, 30, draw.integers(2, 5)), ends], np.int32)  # noqa: E731
        places = ((p, n) for p in range(len(prompts)) for n in range(num_samples))
        return [Sample(p, n, tokens(), np.zeros(0, np.float32), True) for p, n in places]

    def trained(run, name, inputs, begin, kept):
        def produce(folder):
            (folder / "params").mkdir()
            (folder / "params" / "checksums.json").write_text(str(rng(name).normal()))
            (folder / "spent.json").write_text(json.dumps({"passes_tokens": 1e4}))

        return Ended(run.workdir.phase(name, inputs, produce), None)

    def write_checksums(folder, tree):
        folder.mkdir()
        (folder / "checksums.json").write_text(folder.parent.name)

    monkeypatch.setattr(Runtime, "_score", score)
    monkeypatch.setattr(Runtime, "generate", generate)
    monkeypatch.setattr(Runtime, "params", lambda self, policy: policy.name)
    monkeypatch.setattr(made, "write_checksums", write_checksums)
    monkeypatch.setattr(made, "begin_arrays", lambda folder, tree: lambda: None)
    monkeypatch.setattr(start, "load_params", lambda *_: None)
    for module in (optimise, ppo_segment):
        monkeypatch.setattr(module, "run_to_end", trained)
    return state


def phases_said(text):
    """Numbers and totals of the lines that announce a phase, and the lines of those that were found."""
    begun = [(int(n), int(total)) for n, total in re.findall(r"^phase (\d+) of (\d+): (?!finished)", text, re.M)]
    return begun, re.findall(r"^phases? .*already there$", text, re.M)


@pytest.mark.parametrize("case", CASES)
def test_as_many_phases_begin_as_were_announced(case, pretended, tmp_path, capsys):
    experiment.run(tiny_config(tmp_path, tiny=CASES[case]))
    begun, found = phases_said(capsys.readouterr().err)
    total = len(begun)
    assert begun == [(n, total) for n in range(1, total + 1)]
    assert found == []
    made = {path.parent.relative_to(tmp_path / "phases") for path in (tmp_path / "phases").rglob("manifest.json")}
    assert total == len({str(name) for name in made if name.parts[0] not in ("world", "corpus")}), (
        "what is read is no step"
    )


def test_rounds_that_end_early_leave_out_some_of_the_phases_that_were_announced(pretended, tmp_path, capsys):
    case = SERA | {"sera.arms": ("sera", "daa"), "eval.temperatures": (0.0,), "sera.stop_margin_std": 1e-6}
    summary = experiment.run(tiny_config(tmp_path, tiny=case))
    begun, _ = phases_said(capsys.readouterr().err)
    total = begun[0][1]
    assert begun == [(n, total) for n in range(1, len(begun) + 1)] and len(begun) < total
    rounds = {arm: [f["round"] for f in summary["rounds"] if f["arm"] == arm] for arm in ("sera", "daa")}
    assert rounds == {"sera": [1], "daa": [1, 2, 3]}
    updates = {arm: summary["arms"][arm]["updates"] for arm in rounds}
    assert updates["daa"] == 3 * updates["sera"] > 0
    assert summary["params_sha256"]["sera"] != summary["params_sha256"]["daa"]


def test_arms_with_a_loss_of_their_own_share_no_round_and_say_what_they_were_told(pretended, tmp_path):
    arms = ("daa", "cdpo", "robust_dpo", "sera_anchored")
    case = SERA | {"sera.arms": arms, "sera.rounds": 1, "data.label_noise": 0.25}
    case |= {"world.heldout_tasks": ("last", "first")}
    arms = experiment.run(tiny_config(tmp_path, tiny=case))["arms"]
    assert {arm: facts.get("label_smoothing") for arm, facts in arms.items()} == {
        "sft": None, "daa": None, "cdpo": 0.25, "robust_dpo": 0.25, "sera_anchored": None
    }  # fmt: skip
    assert [arm for arm, facts in arms.items() if facts.get("nll_coef") == 0.2] == ["sera_anchored"]
    assert all("gold_by_task" in facts and "gold_out_of_domain" in facts for facts in arms.values())
    made = {
        "round1": "dpo(beta=0.1, label_smoothing=0.0, nll_coef=0.0",
        "cdpo/round1": "dpo(beta=0.1, label_smoothing=0.25, nll_coef=0.0",
        "robust_dpo/round1": "robust(beta=0.1, label_smoothing=0.25, nll_coef=0.0",
        "sera_anchored/round1": "dpo(beta=0.1, label_smoothing=0.0, nll_coef=0.2",
    }
    for name, loss in made.items():
        assert f"('{loss}" in (tmp_path / "phases" / name / "manifest.json").read_text()


def test_the_updates_of_an_arm_are_those_behind_its_result():
    facts = [{"round": 1, "updates": 4}, {"round": 2, "updates": 4, "kept_as_result": True}, {"round": 3, "updates": 4}]
    assert _updates(facts) == 8
    assert _updates(facts[:1]) == 4 and _updates([facts[0], facts[2]]) == 8


@pytest.mark.parametrize(
    ("case", "stop_at"),
    [
        ("sera, all arms", "sera/round2/heldout"),
        ("srppo, all arms", "random_reward/iteration4"),
        ("online", "daa/update5"),
    ],
)
def test_a_restart_counts_what_it_finds(case, stop_at, pretended, tmp_path, capsys):
    config = tiny_config(tmp_path, tiny=CASES[case])
    pretended["stop_at"] = stop_at
    with pytest.raises(Preempted):
        experiment.run(config)
    first, _ = phases_said(capsys.readouterr().err)
    pretended["stop_at"] = None
    experiment.run(config)
    begun, found = phases_said(capsys.readouterr().err)
    stopped, total = first[-1]
    assert 1 < stopped < total
    assert begun == [(n, total) for n in range(stopped, total + 1)]
    assert found == [f"phases 1 to {stopped - 1} of {total}: already there"]

    experiment.run(config)
    assert phases_said(capsys.readouterr().err) == ([], [f"phases 1 to {total} of {total}: already there"])


def test_a_phase_that_is_asked_for_again_counts_once():
    lines = []
    phases = Phases(["sft", "sft/pool", "round1"], lines.append)
    for name, finished in (("sft", True), ("sft/pool", False), ("sft", True), ("sft/pool", True), ("round1", False)):
        phases(name, finished)
    phases.end()
    assert lines == [
        "phase 1 of 3: already there",
        "phase 2 of 3: sft, scoring the offline pairs",
        "phase 3 of 3: round 1, training",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sera/round2/pool", "sera round 2, scoring the offline pairs"),
        ("sera/round2/candidates_by_sera-round2", "sera round 2, scoring the candidates by sera round 2"),
        ("sera/pairs3", "sera round 3, choosing the pairs"),
        ("round1", "round 1, training"),
        ("srppo/iteration16", "srppo iteration 16, PPO"),
        ("srppo/iteration16/generations_by_base", "srppo iteration 16, scoring these answers by base"),
        ("sft_longer", "sft_longer, supervised fine-tuning"),
        ("unheard/of", "unheard, of"),
    ],
)
def test_a_phase_has_words(name, words):
    assert in_words(name) == words
