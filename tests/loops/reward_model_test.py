"""PPO with a reward model: what the model learns from pairs, what it pays, and that all of it can be stopped."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from sera_jax.config import TrainGroup
from sera_jax.data.batches import PairLoader
from sera_jax.data.items import Item, PairItem
from sera_jax.loops import cost
from sera_jax.loops.ppo import prompt_schedule
from sera_jax.loops.reward_model import own_answers, pair_accuracy, reward_model
from sera_jax.loops.rewards import coherent
from sera_jax.loops.runtime import Preempted
from sera_jax.loops.srppo import REWARD_MODEL_ARM, srppo
from sera_jax.models.critic import critic_config, critic_params, row_scores
from sera_jax.training.objectives import reward_objective
from sera_jax.writer import read_records
from tests.loops import kills
from tests.loops.srppo_lab import ITERATIONS, first_rewards, ppo_lines, study_of
from tests.tolerances import TOLERANCES

PACKING = {name: TOLERANCES["packing"][name] for name in ("rtol", "atol")}
GROUP = TrainGroup(batch_size=8, learning_rate=1e-2, num_train_epochs=4, save_steps=1, lr_scheduler_type="constant")
TRAINED = 24  # pairs; the rest are held out


def study_in(lab, folder, **changes):
    """The lab's study with pairs whose chosen sides are demonstrations, and the rejected ones the same said twice."""
    pairs = []
    for n, demonstration in enumerate(lab.study.demonstrations):
        (said,) = demonstration.responses
        responses = (said, np.concatenate([said[:-1], said])[-40:])
        item = Item(f"pair{n}", demonstration.prompt, responses if n % 2 else responses[::-1])
        pairs.append(PairItem(item, ((0, 1) if n % 2 else (1, 0),)))
    study = study_of(lab, folder, **changes)
    return dataclasses.replace(study, reward_model=GROUP, pairs=pairs[:TRAINED], heldout_pairs=pairs[TRAINED:])


def whole_arm(study):
    """The model, what it says of pairs with what all costs, and the policy."""
    with jax.set_mesh(study.run.mesh), study.run.writer, study.run.ledger.account() as spent:
        paying = reward_model(study)
        found = pair_accuracy(study, paying.model)
        policy, _ = srppo(study, dataclasses.replace(REWARD_MODEL_ARM, reward_model=paying))
    return paying, found | cost.facts(spent.values()), policy


@pytest.fixture(scope="module")
def done(lab, tmp_path_factory):
    study = study_in(lab, tmp_path_factory.mktemp("reward_model"))
    return study, *whole_arm(study)


def test_the_model_learns_which_side_is_better_of_pairs_that_it_has_not_seen(done):
    study, _, found, _ = done
    lines, _ = read_records(study.run.workdir.root / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["phase"] == "reward_model"]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5), "a new head says 0 of everything"
    assert len(losses) == GROUP.num_train_epochs * TRAINED // GROUP.batch_size
    assert losses[-1] < 0.5, losses
    assert "reward_model_train_accuracy" not in found
    assert found["reward_model_accuracy"] >= 0.75


def test_without_held_out_pairs_the_accuracy_is_that_of_the_training_pairs_by_name(done, lab, tmp_path):
    study, paying, *_ = done
    study = dataclasses.replace(study_in(lab, tmp_path), heldout_pairs=())
    with jax.set_mesh(study.run.mesh), study.run.writer:
        found = pair_accuracy(study, paying.model)
        scores = study.run.score("again", paying.model, [pair.item for pair in study.pairs])
    right = [s[w] > s[l] for pair, s in zip(study.pairs, scores, strict=True) for w, l in pair.pairs]
    assert found == {"reward_model_train_accuracy": pytest.approx(np.mean(right))}


def test_the_loss_of_a_batch_is_bradley_and_terrys_of_the_scores_and_its_gradient_lifts_the_chosen_side(lab, tmp_path):
    study = study_in(lab, tmp_path)
    run = study.run
    cfg, window = critic_config(run.cfg), 64
    params = critic_params(jax.device_get(run.params(study.sft)))
    params["value_head"] = np.random.default_rng(0).standard_normal(cfg.hidden_size).astype(np.float32)
    batch = PairLoader(study.pairs, run.layout, batch_size=8, seed=0).batch(0).arrays
    objective = reward_objective(cfg, window=window)

    @jax.jit
    def step(params):
        (loss, (weight, metrics)), grads = jax.value_and_grad(
            lambda p: (lambda loss, weight, metrics: (loss, (weight, metrics)))(*objective(p, batch)), has_aux=True
        )(params)
        moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        scores = [row_scores(cfg, p, batch.rows, window=window) for p in (params, moved)]
        return loss, weight, metrics, scores

    loss, weight, metrics, (before, after) = jax.device_get(step(params))

    def margins(scores):
        used = np.nonzero(batch.weight)
        chosen, rejected = (scores[used[0], slot[used]] for slot in (batch.chosen_slot, batch.rejected_slot))
        return np.float64(chosen) - rejected

    assert weight == 8
    np.testing.assert_allclose(loss, np.logaddexp(0, -margins(before)).sum(), **PACKING)
    np.testing.assert_allclose(metrics["rewards/accuracies"].value(), (margins(before) > 0).mean())
    assert margins(after).mean() > margins(before).mean()


def test_what_is_paid_has_the_coherent_rewards_mean_and_variance_over_the_sft_models_own_answers(done):
    study, paying, *_ = done
    with jax.set_mesh(study.run.mesh):
        answers, scores = own_answers(study, paying.model)
    prompts = itertools.chain.from_iterable(map(prompt_schedule(study).prompts, range(1, ITERATIONS + 1)))
    assert [c.prompt.id for c in answers] == [item.id for item in prompts]
    ended = np.concatenate([c.finished for c in answers])
    rewards = np.concatenate([coherent(c) for c in answers])[ended]
    paid = paying.paid(np.concatenate(scores))[ended]
    assert 2 < ended.sum() < len(ended)
    np.testing.assert_allclose([paid.mean(), paid.std()], [rewards.mean(), rewards.std()], **PACKING)
    assert paying.scale > 0, "what it likes better is paid more"


def test_ppo_is_paid_the_models_score_at_the_end_of_the_answer(done, lab, tmp_path):
    """The first rollouts are those of the method, whatever is paid for them."""
    _, paying, *_ = done
    study = study_in(lab, tmp_path, reward__missing_eos="keep", ppo__kl_coef=0.0)
    arm = dataclasses.replace(REWARD_MODEL_ARM, reward_model=paying)
    metrics, *_ = first_rewards(study, arm)
    seen = lab.seen["srppo", 1]
    alone = study_in(lab, tmp_path / "alone").run
    with jax.set_mesh(alone.mesh), alone.writer:
        scores = np.concatenate(alone.score("alone", paying.model, seen.rollouts.items))
    assert metrics["objective/scores"] == pytest.approx(paying.paid(scores).mean(), **_approx(PACKING))
    assert metrics["coherent_reward/mean"] == pytest.approx(lab.lines("srppo")[0]["coherent_reward/mean"], rel=1e-5)


def test_the_arm_costs_what_ppo_does_and_its_model_and_the_answers_that_it_is_measured_on(done):
    study, paying, found, _ = done
    with jax.set_mesh(study.run.mesh):
        answers, _ = own_answers(study, paying.model)
    pairs = GROUP.num_train_epochs * sum(pair.item.tokens for pair in study.pairs)
    answered = sum(c.item.tokens for c in answers)
    lines = ppo_lines(study.run.workdir.root, "ppo_reward_model")
    ppo = {kind: sum(line[f"cost/{kind}"] for line in lines) for kind in cost.KINDS}
    sampled = ppo["sampling"]
    assert (ppo["scoring"], ppo["training"]) == (4 * sampled, 6 * sampled), "the model scores in place of the base"
    assert found["cost/training"] == ppo["training"] + 3 * pairs
    assert found["cost/sampling"] == ppo["sampling"] + answered
    assert found["cost/scoring"] == ppo["scoring"] + 3 * answered


def test_an_arm_that_is_stopped_again_and_again_ends_as_one_that_was_not(done, lab, tmp_path):
    study, paying, found, policy = done
    stops, ended = 0, None
    for patience in (3, 9, 16, 10**6):
        ours = study_in(lab, tmp_path)
        asked = itertools.count()
        ours.run.stop_requested = lambda asked=asked, patience=patience: next(asked) >= patience
        try:
            ended = whole_arm(ours)
        except Preempted:
            stops += 1
    assert stops == 3 and ended is not None
    again, accuracy, last = ended
    assert (again.shift, again.scale, accuracy) == (paying.shift, paying.scale, found)
    assert (again.model.digest, last.digest) == (paying.model.digest, policy.digest)
    assert kills.metrics(tmp_path) == kills.metrics(study.run.workdir.root)
    assert kills.products(tmp_path) == kills.products(study.run.workdir.root)


def _approx(tolerance):
    return {"rel": tolerance["rtol"], "abs": tolerance["atol"]}
