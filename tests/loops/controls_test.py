"""The controls of Self-Rewarding PPO: more SFT, and the SFT model with the coherent reward as a re-ranker."""

import dataclasses
import json

import jax
import numpy as np

from sera_jax.data.items import Item
from sera_jax.loops.controls import best_of_n, sft_equal_compute, sft_longer
from sera_jax.writer import read_records
from tests.loops.srppo_lab import ITERATIONS, jsonl, study_of
from tests.loops.tiny import BATCH
from tests.tolerances import TOLERANCES

SLACK = 2 * TOLERANCES["packing"]["atol"]


def inputs(lab, name):
    return json.loads((lab.root / "phases" / name / "manifest.json").read_text())["inputs"]


def updates(root, name):
    return [r["step"] for r in read_records(root / "metrics.jsonl")[0] if r["phase"] == name]


def rates(root, name):
    return [r["learning_rate"] for r in read_records(root / "metrics.jsonl")[0] if r["phase"] == name]


def test_sft_for_longer_makes_its_factor_of_the_updates_from_the_base_on_one_schedule(lab):
    once, longer = updates(lab.root, "sft"), updates(lab.root, "sft_longer")
    assert len(once) == lab.config.world.demonstrations // BATCH
    assert longer == list(range(1, lab.config.ppo.sft_longer_factor * len(once) + 1))
    ours, theirs = inputs(lab, "sft_longer"), inputs(lab, "sft")
    assert (
        (ours["start"], ours["items"]) == (theirs["start"], theirs["items"]) == (lab.study.base.digest, theirs["items"])
    )
    assert ours["continue_from"] is None
    # a longer schedule, not the short one again: after the warm-up the rate only falls
    falling = rates(lab.root, "sft_longer")[1:]
    assert falling == sorted(falling, reverse=True)


def test_sft_of_equal_compute_makes_the_updates_that_ppo_would_pay_for(lab):
    parts = [part for i in range(1, ITERATIONS + 1) for part in lab.seen["srppo", i].rollouts.parts]
    tokens = sum(int((part.rows.segment > 0).sum()) for part in parts)
    # decoding, scores under policy, SFT model and base, and values: one pass each; forward and backward of policy and
    # critic: three each
    passes = 4 + 1 + 2 * 3
    facts = [f for f in lab.summary["rounds"] if f["arm"] == "srppo"]
    assert facts[-1]["passes_tokens"] == passes * tokens
    assert 0 < facts[0]["passes_tokens"] < facts[-1]["passes_tokens"]
    of_demonstrations = sum(item.tokens for item in lab.study.demonstrations) / len(lab.study.demonstrations)
    more = passes * tokens / (3 * BATCH * of_demonstrations)
    made = updates(lab.root, "sft_equal_compute")
    assert made == list(range(1, len(updates(lab.root, "sft")) + round(more) + 1))
    assert inputs(lab, "sft_equal_compute")["start"] == lab.study.base.digest


def test_ppo_that_cost_nothing_leaves_the_updates_of_sft_itself(lab, tmp_path):
    group = dataclasses.replace(lab.config.sft, max_steps=1)
    study = study_of(lab, tmp_path)
    with study.run.writer:
        sft_equal_compute(study, group, 0.0)
        assert updates(tmp_path, "sft_equal_compute") == [1]
        sft_longer(study, group)
    assert updates(tmp_path, "sft_longer") == [1, 2, 3], "max_steps is what SFT makes"


def test_the_best_of_the_candidates_has_the_largest_coherent_reward_of_those_that_ended(lab, tmp_path):
    study, prompts = study_of(lab, tmp_path), lab.study.prompts[:8]
    run = study.run
    with jax.set_mesh(run.mesh), run.writer:
        answers = best_of_n(study, prompts, study.sampling)
        samples = jsonl(tmp_path / "phases" / "best_of_n" / "candidates" / "samples.jsonl")
        alone = [
            Item(str(n), prompts[row["prompt"]].prompt, (np.array(row["tokens"]),)) for n, row in enumerate(samples)
        ]
        by_sft, by_base = (np.concatenate(run.score(p.name, p, alone)) for p in (lab.study.sft, lab.study.base))
    assert len(samples) == len(prompts) * study.ppo.best_of
    chosen_over = 0
    for i, (tokens, ended) in enumerate((answer.tokens, answer.finished) for answer in answers):
        here = [n for n, row in enumerate(samples) if row["prompt"] == i]
        assert ended == any(samples[n]["finished"] for n in here), "an answer that was cut only where all were"
        rivals = {tuple(samples[n]["tokens"]): by_sft[n] - by_base[n] for n in here if samples[n]["finished"] == ended}
        mine = rivals[tuple(tokens)]
        assert mine >= max(rivals.values()) - SLACK
        assert mine >= np.mean(list(rivals.values())) - SLACK
        chosen_over += len(rivals) > 1 and mine > min(rivals.values()) + SLACK
    assert chosen_over > 1, "with nothing to choose from this would say nothing"


def test_without_prompts_there_are_no_answers(lab, tmp_path):
    assert best_of_n(study_of(lab, tmp_path), [], lab.study.sampling) == []


def test_the_reported_answers_are_better_by_the_reward_than_those_of_the_sft_model(lab):
    arms = lab.summary["arms"]
    assert arms["best_of_n"]["coherent_reward_mean"] > arms["sft"]["coherent_reward_mean"]
    assert arms["best_of_n"]["eos_fraction"] >= arms["sft"]["eos_fraction"]
