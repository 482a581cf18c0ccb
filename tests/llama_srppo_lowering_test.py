"""configs/llama_srppo.py at its full size: every compiled program of a PPO iteration is traced and lowered for a mesh
of 8; nothing is allocated and nothing is compiled.

What is lowered is what a run would compile, as the preflight plans it: the config as parsed, the programs and settings
of its Learner, rows as `lay_rollouts` makes them of 256 rollouts of full length. Each program is given what the one
before it returns.
"""

import jax
import numpy as np
import pytest

from configs.llama_srppo import get_config
from sera_jax.aot.programs import params_on
from sera_jax.experiment.methods import parse
from sera_jax.experiment.methods.srppo import study_of
from sera_jax.loops.ppo import Learner
from sera_jax.loops.srppo import SRPPO_ARM
from sera_jax.models.critic import without_value_head
from sera_jax.models.decoder import abstract_params
from tests.lowering import (
    assert_arguments_lie_as_asked,
    assert_state_returns_in_place,
    bytes_on_a_device,
    largest_logits,
    lowered_by_name,
    programs_for_eight,
    result_of,
)

CONFIG = parse(get_config())
PARAMETERS = 8_030_261_248  # Llama 3 8B
DEVICES = 8
T = CONFIG.data.row_tokens
PROMPT, RESPONSE = CONFIG.data.max_prompt_length, CONFIG.sampling.max_new_tokens
LOGITS = CONFIG.train.logits_chunk_tokens * DEVICES
SMALL = 2**20  # bytes; norm scales and counters are whole on every device, nothing larger is


REWARDS = "srppo: rewards and advantages"


@pytest.fixture(scope="module")
def planned():
    return programs_for_eight(CONFIG)


@pytest.fixture(scope="module")
def mesh(planned):
    assert dict(planned[1].shape) == {"data": 1, "fsdp": DEVICES, "tensor": 1}
    return planned[1]


@pytest.fixture(scope="module")
def learner(planned):
    given = planned[2].given
    return Learner(study_of(given, given.evaluator(base=given.base)), SRPPO_ARM)


@pytest.fixture(scope="module")
def cfg(learner):
    return learner.study.run.cfg


@pytest.fixture(scope="module")
def lowered(planned, mesh):
    """(The lowered program, its arguments) of what an iteration scores, by name."""
    return lowered_by_name(planned[0], mesh, ["srppo: score", "srppo: values", REWARDS])


@pytest.fixture(scope="module")
def scored(lowered):
    """What the rewards are made of: the minibatches, every prompt and every response as long as the config admits."""
    return lowered[REWARDS][1][0]


@pytest.fixture(scope="module")
def parts(scored):
    return [part.rows for part in scored]


@pytest.fixture(scope="module")
def score(lowered):
    return lowered["srppo: score"][0]


@pytest.fixture(scope="module")
def values(lowered):
    return lowered["srppo: values"][0]


@pytest.fixture(scope="module")
def experience(lowered):
    return lowered[REWARDS][0]


def assert_nothing_large_is_whole(*arguments):
    for path, leaf in jax.tree.leaves_with_path(arguments):
        if leaf.size * leaf.dtype.itemsize > SMALL:
            share = leaf.size * leaf.dtype.itemsize / DEVICES
            assert bytes_on_a_device(leaf) == share, jax.tree_util.keystr(path)


def test_the_config_has_the_size_it_is_named_after(learner, cfg):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg))) == PARAMETERS
    assert learner.schedule.per_iteration * CONFIG.ppo.num_samples == CONFIG.train.batch_size == 256
    assert learner.longest_prompt + learner.sampling.max_new_tokens == learner.window == 2048


def test_all_four_models_and_both_optimisers_are_split_over_all_devices(learner, mesh, cfg):
    state, frozen = learner.programs.abstract, params_on(learner.study.run)
    assert_nothing_large_is_whole(state, frozen)
    head = cfg.vocab_size * cfg.hidden_size
    trained = (
        PARAMETERS + PARAMETERS - head + cfg.hidden_size
    )  # the critic has a scalar head in place of the vocabulary
    held = sum(map(bytes_on_a_device, jax.tree.leaves([state, frozen, frozen])))
    assert held == pytest.approx((3 * 4 * trained + 2 * 4 * PARAMETERS) / DEVICES, rel=1e-3)


def test_a_minibatch_lies_in_full_rows_spread_over_all_devices(learner, parts):
    responses = CONFIG.train.batch_size // CONFIG.ppo.num_mini_batches
    for rows in parts:
        assert rows.tokens.shape == (responses // 2, T), "two rollouts of full length fill a row"
        assert rows.source.shape[1] == 2 * RESPONSE, "scored positions only"
        assert rows.tokens.sharding.shard_shape(rows.tokens.shape) == (responses // 2 // DEVICES, T)
    assert parts[0].tokens.shape[0] % learner.layout.dealt == 0, "microbatches of as many rows on every device"


def test_one_scorer_serves_policy_sft_model_and_base(learner, mesh, parts, score, cfg):
    policy = without_value_head(learner.programs.abstract.policy.params)
    frozen = params_on(learner.study.run)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), policy) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), frozen
    ), "the same shapes and layout: one compilation"
    assert_arguments_lie_as_asked(score, frozen, parts[0])
    assert_nothing_large_is_whole(frozen, parts[0])
    assert (score.out_info.shape, score.out_info.dtype) == (parts[0].slot.shape, np.float32)
    assert 0 < largest_logits(score, cfg, DEVICES) <= LOGITS, "logits of one chunk of positions at a time"


def test_the_critic_says_a_value_for_every_scored_token_and_holds_no_logits(learner, mesh, parts, values, cfg):
    assert_arguments_lie_as_asked(values, learner.programs.abstract.critic.params, parts[0], unread={"target"})
    assert (values.out_info.shape, values.out_info.dtype) == (parts[0].slot.shape, np.float32)
    assert f"x{cfg.vocab_size}x" not in values.as_text(), "its only array of that size is the embedding table"


def test_rewards_and_advantages_stay_spread_as_the_rows_are(learner, scored, experience):
    control = learner.programs.abstract.control
    # numbers made on the host are for other rewards; the shape of the last iteration is replaced by this one's
    assert_arguments_lie_as_asked(experience, scored, control, unread={"given", "shape"})
    made, after, metrics = result_of(experience)
    microbatches = CONFIG.train.gradient_accumulation_steps
    rows = scored[0].rows.tokens.shape[0] // microbatches
    for leaf in jax.tree.leaves(made):
        assert leaf.shape[:2] == (microbatches, rows)
        assert leaf.sharding.shard_shape(leaf.shape)[:2] == (microbatches, rows // DEVICES)
    assert made[0].advantage.dtype == made[0].returns.dtype == np.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), control)
    assert all(leaf.shape == () for leaf in metrics.values())


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        # the KL is paid in the reward, so the loss of the policy needs neither the SFT model nor the coefficient
        ("policy", {"sft_logp", "kl_coef", "old_value", "returns", "value_scale"}),
        # values are not clipped, so the old ones are not asked for
        ("critic", {"target", "old_logp", "sft_logp", "advantage", "kl_coef", "old_value"}),
    ],
)
def test_an_update_lowers_gives_its_state_back_in_place_and_exports_for_a_tpu(
    learner, mesh, experience, name, unread, cfg
):
    step, state = getattr(learner.programs, f"{name}_step"), getattr(learner.programs.abstract, name)
    batch = result_of(experience)[0][0]
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
        exported = jax.export.export(step, platforms=["tpu"])(state, batch)
    assert_arguments_lie_as_asked(lowered, state, batch, unread=unread)
    assert_nothing_large_is_whole(state, batch)
    after, metrics = lowered.out_info
    assert_state_returns_in_place(lowered, state, after)
    assert metrics["loss"].total.sharding.is_fully_replicated
    positions = largest_logits(lowered, cfg, DEVICES)
    assert 0 < positions <= LOGITS if name == "policy" else positions == 0
    assert (exported.platforms, exported.nr_devices) == (("tpu",), DEVICES)


def test_scoring_and_rewards_export_for_a_tpu(learner, mesh, parts, scored, cfg):
    programs = learner.programs
    given = {
        programs.score: (params_on(learner.study.run), parts[0]),
        programs.values: (programs.abstract.critic.params, parts[0]),
        programs.experience: (scored, programs.abstract.control),
    }
    with jax.set_mesh(mesh):
        for program, arguments in given.items():
            exported = jax.export.export(program, platforms=["tpu"])(*arguments)
            assert (exported.platforms, exported.nr_devices) == (("tpu",), DEVICES)


def test_the_first_state_is_made_of_the_sft_model_where_it_will_lie(learner, mesh, cfg):
    sft, state = params_on(learner.study.run), learner.programs.abstract
    with jax.set_mesh(mesh):
        lowered = learner.programs.start.lower(sft)
    assert_arguments_lie_as_asked(lowered, sft)
    for (path, old), new in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(lowered.out_info), strict=True):
        assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding), path


def test_rollouts_lower_with_weights_and_cache_split_over_the_heads(learner, planned, mesh, cfg):
    sampling = learner.study.run.sampling_params(learner.sampling)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0), "as the scorer scores"
    name = "srppo: rollouts"
    steps = [f"{name}: {part}" for part in ("prepare", "empty cache", "prefill", "insert", "decode")]
    lowered = lowered_by_name(planned[0], mesh, steps)
    (prepare, (params,)), (decode, (_, empty, *_)) = lowered[steps[0]], lowered[steps[-1]]
    prefill = lowered[steps[2]][0]
    assert_arguments_lie_as_asked(prepare, params)
    assert prefill.out_info.keys[0].shape == (DEVICES, cfg.num_key_value_heads, cfg.head_dim, PROMPT)
    assert_nothing_large_is_whole(result_of(prepare))
    assert_nothing_large_is_whole(empty)
    keys = empty.cache.keys[0]
    assert keys.sharding.shard_shape(keys.shape)[1] == cfg.num_key_value_heads // DEVICES
    after, report = decode.out_info
    for old, new in zip(jax.tree.leaves(empty), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding)
    assert report.logps.sharding.is_fully_replicated
