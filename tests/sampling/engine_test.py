"""Laws of `generate`: what it draws, that neighbours do not matter, and that slots stay full."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sera_jax.aot.collectives import collectives
from sera_jax.core import Rows, Stream, key_for
from sera_jax.mesh import make_mesh, param_shardings, placed_shapes, replicated
from sera_jax.models import decoder
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params, hidden_states, init_params, unembedding
from sera_jax.models.parts import split
from sera_jax.ops.logprob import token_logps
from sera_jax.sampling import Draws, SamplingParams, Stats, engine, generate
from sera_jax.sampling.cache import Split, Stacked
from sera_jax.sampling.choose import choose
from sera_jax.sampling.decode import programs
from sera_jax.sampling.engine import mesh_for
from tests.lowering import bytes_on_a_device, result_of
from tests.tolerances import TOLERANCES

# A wide initialisation, so that the distributions differ from token to token and some tokens are likely.
CFG = ModelConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,
)
STOP = (1, 5, 9)
ROW = 64


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(CFG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, CFG.vocab_size, n).astype(np.int32) for n in (5, 1, 12, 8, 2, 17, 3)]


def draw(
    params, prompts, *, cfg=CFG, ids=None, num_samples=1, slots=4, seed=0, round=0, mesh=None, stats=None, **settings
):
    settings = dict(temperature=1.0, max_new_tokens=10, stop_ids=STOP) | settings
    progress, drawn = settings.pop("on_progress", None), settings.pop("drawn", ())
    return generate(
        cfg,
        params,
        Draws(prompts, range(len(prompts)) if ids is None else ids, num_samples, seed, round, drawn),
        SamplingParams(**settings),
        slots=slots,
        mesh=mesh,
        max_prompt_tokens=17,
        stats=stats,
        on_progress=progress,
    )


def bounds(kind):
    return {name: TOLERANCES[kind][name] for name in ("rtol", "atol")}


def _score(cfg, params, rows):
    hidden = hidden_states(cfg, params, rows)
    unembed = unembedding(cfg, params)
    return unembed(hidden), token_logps(hidden, unembed, rows, chunk=ROW)


SCORE = jax.jit(functools.partial(_score, CFG))


def scorer(params, prompt, response, score=SCORE):
    """Logits f32[n, V] that predict each response token, and the response's log-probs f32[n], by the scorer."""
    tokens = np.concatenate([prompt, response])
    length, n = len(tokens), len(response)
    inside = np.arange(ROW) < length
    row = np.where(inside, np.pad(tokens, (0, ROW - length)), 0)
    source = np.minimum(len(prompt) - 1 + np.arange(ROW), ROW - 1)
    used = np.arange(ROW) < n
    rows = Rows(
        tokens=row[None],
        positions=np.where(inside, np.arange(ROW), 0)[None],
        segment=inside.astype(np.int32)[None],
        branch=(inside & (np.arange(ROW) >= len(prompt))).astype(np.int32)[None],
        source=source[None],
        target=np.where(used, np.pad(response, (0, ROW - n)), 0)[None],
        slot=np.where(used, 0, 1)[None],
        num_slots=1,
    )
    logits, logps = score(params, jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), rows))
    return np.asarray(logits[0, len(prompt) - 1 : len(prompt) - 1 + n]), np.asarray(logps[0, :n])


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn_and_take_no_mass_from_the_others(params, prompts):
    """Within the vocabulary and at its end, at any temperature and filter; sampler and scorer agree on the others."""
    cfg = dataclasses.replace(CFG, absent_ids=((3, 5), (20, 24)))
    absent = [3, 4, 20, 21, 22, 23]
    rows = params["embed"].at[jnp.array(absent)].mul(50.0)  # by their own logits they would win every time
    params = params | {"embed": rows}
    score = jax.jit(functools.partial(_score, cfg))
    assert set(absent) & {t for s in draw(params, prompts, num_samples=2) for t in s.tokens.tolist()}
    for settings in ({}, {"temperature": 0.0}, {"temperature": 1e30}, {"top_k": 22}, {"min_new_tokens": 10}):
        for sample in draw(params, prompts, cfg=cfg, num_samples=2, **settings):
            assert not set(absent) & set(sample.tokens.tolist())
            if not settings:
                logits, logps = scorer(params, prompts[sample.prompt], sample.tokens, score)
                np.testing.assert_allclose(sample.logps, logps, **bounds("decoding"))
                left = np.delete(logits, absent, axis=1)
                places = np.array([t - sum(a < t for a in absent) for t in sample.tokens])
                expected = np.array([jax.nn.log_softmax(row)[at] for row, at in zip(left, places, strict=True)])
                np.testing.assert_allclose(logps, expected, **bounds("decoding"))


def assert_same(left, right):
    assert [(s.prompt, s.sample, s.finished) for s in left] == [(s.prompt, s.sample, s.finished) for s in right]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logps, b.logps)


def test_greedy_decoding_is_the_argmax_of_the_scorer_at_every_step(params, prompts):
    samples = draw(params, prompts, temperature=0.0, max_new_tokens=20, min_new_tokens=0, stop_ids=(23,))
    assert len({tuple(s.tokens) for s in samples}) > 1
    for sample in samples:
        logits, _ = scorer(params, prompts[sample.prompt], sample.tokens)
        np.testing.assert_array_equal(logits.argmax(-1), sample.tokens)


def test_what_a_block_asks_of_attention_holds_for_scoring_prefill_and_decoding_alike(params, prompts, monkeypatch):
    """A model of another kind is written once, in the decoder: this one caps and scales scores and slides a window."""

    class Other(decoder.Block):
        def __call__(self, x, cos, sin, window, attend, cache):
            def own(q, k, v, cache, **_):
                return attend(q, k, v, cache, scale=0.5, soft_cap=3.0, sliding_window=6)

            return super().__call__(x, cos, sin, window, own, cache)

    cfg = dataclasses.replace(CFG, rms_norm_eps=2e-5)  # of its own, so that no program of another test is taken for it
    monkeypatch.setattr(decoder, "Block", Other)
    samples = draw(params, prompts, cfg=cfg, temperature=0.0, max_new_tokens=20, stop_ids=(23,))
    score = jax.jit(functools.partial(_score, cfg))
    for sample in samples:
        logits, _ = scorer(params, prompts[sample.prompt], sample.tokens, score=score)
        np.testing.assert_array_equal(logits.argmax(-1), sample.tokens)
    monkeypatch.undo()
    plain = draw(params, prompts, temperature=0.0, max_new_tokens=20, stop_ids=(23,))
    assert any(not np.array_equal(one.tokens, other.tokens) for one, other in zip(samples, plain))


def test_returned_logps_are_the_scorers_whatever_filters_drew_the_tokens(params, prompts):
    for settings in (dict(), dict(temperature=0.5, top_p=0.8, top_k=6)):
        for sample in draw(params, prompts, num_samples=2, **settings):
            _, logps = scorer(params, prompts[sample.prompt], sample.tokens)
            np.testing.assert_allclose(sample.logps, logps, **bounds("decoding"))


def test_first_tokens_are_distributed_as_the_scorer_says(params, prompts):
    count = 2000
    samples = draw(params, prompts[:1], num_samples=count, slots=200, max_new_tokens=1, temperature=0.8, top_p=0.9)
    counts = np.bincount([s.tokens[0] for s in samples], minlength=CFG.vocab_size)
    logits = scorer(params, prompts[0], samples[0].tokens)[0][0].astype(np.float64) / 0.8
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p = np.where([p[p > x].sum() < 0.9 for x in p], p, 0)
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    often = p * count >= 5
    cells = lambda x: np.append(x[often], x[~often].sum()) if x[~often].sum() else x[often]  # noqa: E731
    assert stats.chisquare(cells(counts), cells(p * count)).pvalue > 1e-4


def test_a_samples_key_is_that_of_its_seed_round_prompt_id_and_index(params, prompts):
    ids = [7, 7 + (4_000_000_000 << 32)]  # of one low word
    samples = draw(params, prompts[2:4], ids=ids, num_samples=2, seed=5, round=3, temperature=1.3, top_p=0.9)
    for sample in samples:
        high, low = np.uint64(ids[sample.prompt]).reshape(1).view(np.uint32)[::-1]
        key = key_for(5, Stream.SAMPLE, 3, high, low, sample.sample)
        logits, _ = scorer(params, prompts[2 + sample.prompt], sample.tokens)
        token, _ = choose(
            logits=jnp.asarray(logits),
            keys=jnp.stack([key] * len(logits)),
            index=jnp.arange(len(logits)),
            temperature=1.3,
            top_p=0.9,
            top_k=0,
            min_new_tokens=0,
            stop_ids=STOP,
        )
        np.testing.assert_array_equal(token, sample.tokens)


def test_seeds_rounds_and_sample_indices_draw_different_samples(params, prompts):
    def tokens(**settings):
        return [tuple(s.tokens) for s in draw(params, prompts[:3], num_samples=3, stop_ids=(23,), **settings)]

    base = tokens()
    assert len(set(base)) == 9
    assert base != tokens(seed=1) and base != tokens(round=1)


def test_the_same_call_twice_gives_the_same_samples_bit_for_bit(params, prompts):
    assert_same(draw(params, prompts, num_samples=3), draw(params, prompts, num_samples=3))


def test_a_sample_does_not_depend_on_order_neighbours_or_slot(params, prompts):
    whole = draw(params, prompts, num_samples=3, max_new_tokens=24)
    order = [4, 0, 6, 2, 5, 3, 1]
    shuffled = draw(params, [prompts[i] for i in order], ids=order, num_samples=3, max_new_tokens=24)
    back = [dataclasses.replace(s, prompt=order[s.prompt]) for s in shuffled]
    assert_same(whole, sorted(back, key=lambda s: (s.prompt, s.sample)))
    alone = draw(params, [prompts[5]], ids=[5], num_samples=3, max_new_tokens=24)
    assert_same([s for s in whole if s.prompt == 5], [dataclasses.replace(s, prompt=5) for s in alone])


def test_what_is_drawn_already_is_not_drawn_again_and_the_rest_is_the_same_bit_for_bit(params, prompts):
    whole, stats = draw(params, prompts, num_samples=3), Stats()
    drawn = [whole[i] for i in (17, 0, 2, 1, 4, 9, 16, 15)]  # all of prompts 0 and 5
    assert_same(whole, draw(params, prompts, num_samples=3, drawn=drawn, stats=stats))
    assert stats.tokens == sum(len(s.tokens) for s in whole) - sum(len(s.tokens) for s in drawn)
    assert_same(whole, draw(params, prompts, num_samples=3, drawn=whole))


def test_samples_come_ordered_by_prompt_and_index_and_numbered_from_zero(params, prompts):
    samples = draw(params, prompts, num_samples=3)
    assert [(s.prompt, s.sample) for s in samples] == [(p, n) for p in range(len(prompts)) for n in range(3)]


def test_the_samples_of_a_prompt_share_one_prefill(params, prompts):
    stats = Stats()
    draw(params, prompts, num_samples=5, slots=4, stats=stats)
    assert stats.prefilled_prompts == len(prompts)


def test_finished_slots_are_refilled_while_long_answers_go_on(params, prompts):
    stats, slots = Stats(), 4
    samples = draw(params, prompts[:4], num_samples=16, slots=slots, max_new_tokens=100, stop_ids=(1,), stats=stats)
    lengths = [len(s.tokens) for s in samples]
    synchronous = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    assert max(lengths) > 2 * np.mean(lengths)  # the example is skewed
    assert sum(lengths) / slots <= stats.decode_steps < 0.75 * synchronous
    assert stats.tokens == sum(lengths)


def test_a_sample_ends_with_the_first_stop_token_and_includes_it(params, prompts):
    samples = draw(params, prompts, num_samples=4)
    assert {s.finished for s in samples} == {True, False}
    for sample in samples:
        assert not np.isin(sample.tokens[:-1], STOP).any()
        assert sample.finished == (sample.tokens[-1] in STOP)
        assert sample.finished or len(sample.tokens) == 10
        assert len(sample.logps) == len(sample.tokens)


def test_a_stop_token_comes_after_the_least_length_and_nothing_after_the_greatest(params, prompts):
    samples = draw(params, prompts, num_samples=8, min_new_tokens=4, max_new_tokens=6)
    assert {len(s.tokens) for s in samples} == {5, 6}
    assert not any(np.isin(s.tokens[:4], STOP).any() for s in samples)


def test_prompts_of_other_lengths_and_contents_compile_nothing_new(params, prompts):
    settings = dict(max_new_tokens=10, temperature=1.0, stop_ids=STOP)
    draw(params, prompts)
    made = programs(CFG, SamplingParams(**settings), None, 4, Split)
    sizes = [made.decode._cache_size(), made.insert._cache_size(), made.prefill._cache_size()]
    draw(params, prompts[::-1], num_samples=4, seed=9)
    assert [made.decode._cache_size(), made.insert._cache_size(), made.prefill._cache_size()][:2] == sizes[:2]
    assert made.decode._cache_size() == 1


@pytest.mark.parametrize("form", [Split, Stacked])
def test_a_decode_step_copies_no_cache(params, form):
    sampling, slots, columns = SamplingParams(stop_ids=STOP), 5, 67
    made = programs(CFG, sampling, None, slots, form)
    state = made.empty(slots, columns)
    bound = jnp.int32(1)
    text = made.decode.lower(made.prepare(params), state, bound, bound).compile().as_text()
    shapes = {",".join(map(str, array.shape)) for array in jax.tree.leaves(state.cache)}
    assert all(f"f32[{shape}]" in text for shape in shapes)
    assert not re.search(rf"f32\[({'|'.join(shapes)})\]\S* copy\(", text)


@pytest.mark.parametrize("tensor", [0, 2])
def test_an_accelerators_form_of_the_cache_draws_the_same_tokens(params, prompts, monkeypatch, tensor):
    """Without a mesh, and on one whose weights are whole on each device or in two parts."""
    one = draw(params, prompts, num_samples=2, slots=8)
    monkeypatch.setattr(engine, "form_for", lambda devices: Stacked)
    mesh, given = None, params
    if tensor:
        training = make_mesh(data=1, fsdp=-1)
        mesh, given = mesh_for(CFG, training, tensor), jax.device_put(params, param_shardings(training, params))
    other = draw(given, prompts, num_samples=2, slots=8, mesh=mesh)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, **bounds("mesh"))


@pytest.mark.parametrize("form", [Split, Stacked])
def test_decoding_and_prefill_gather_no_weight(form):
    """Of parameters split over all devices for training; what crosses between devices is activations and logits."""
    cfg = dataclasses.replace(CFG, hidden_size=1024, num_key_value_heads=4, vocab_size=512, intermediate_size=512)
    training = make_mesh(data=1, fsdp=-1)
    mesh = mesh_for(cfg, training, 4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    made = programs(cfg, SamplingParams(stop_ids=STOP), mesh, 8, form)
    tokens = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=replicated(mesh))
    with jax.set_mesh(mesh):
        prepared = result_of(made.prepare.lower(placed_shapes(training, abstract_params(cfg))))
        decode, prefill = made.lower_decode(64), made.prefill.lower(prepared, tokens)
    kernels = split(prepared["layers"]["block"] if form is Stacked else prepared["layers"][0], ".*/kernel")[0]
    smallest = min(map(bytes_on_a_device, jax.tree.leaves(kernels)))
    for program in decode, prefill:
        crossing = {found.kind: found.bytes for found in collectives(program.compile().as_text())}
        assert "all-reduce" in crossing, "what the parts of a weight give is added up"
        assert crossing.get("all-gather", 0) < smallest


def test_small_models_are_decoded_whole_and_large_ones_in_as_many_parts_as_devices_and_heads_share():
    llama = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, head_dim=128, dtype="bfloat16")
    llama |= dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
    mesh = make_mesh(data=1, fsdp=-1)
    assert mesh_for(CFG, mesh).shape["tensor"] == 1
    assert mesh_for(ModelConfig(**llama), mesh).shape["tensor"] == 8
    grouped = mesh_for(ModelConfig(**llama | {"num_key_value_heads": 4}), mesh)
    assert dict(grouped.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert list(grouped.devices.flat) == list(mesh.devices.flat), "so that weights go over in one program"
    assert mesh_for(ModelConfig(**llama | {"vocab_size": 32001}), mesh).shape["tensor"] == 1


@pytest.mark.parametrize(
    ("parts", "message"), [(3, "=3 does not divide the 8 devices"), (4, "=4 .* 2 key/value heads")]
)
def test_a_number_of_parts_that_does_not_divide_what_is_split_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        mesh_for(CFG, make_mesh(data=1, fsdp=-1), parts)


def test_no_value_crosses_to_the_device_implicitly(params, prompts):
    draw(params, prompts)
    with jax.transfer_guard_host_to_device("disallow"):
        draw(params, prompts)


def test_a_mesh_of_eight_devices_draws_the_same_tokens(params, prompts):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = jax.device_put(params, param_shardings(mesh, params))
    one = draw(params, prompts, num_samples=2, slots=8)
    many = draw(sharded, prompts, num_samples=2, slots=8, mesh=mesh)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, **bounds("mesh"))


def test_slots_that_the_mesh_does_not_divide_are_decoded_all_the_same(params, prompts):
    mesh = make_mesh(data=2, fsdp=1, devices=jax.devices()[:2])
    sharded = jax.device_put(params, param_shardings(mesh, params))
    one = draw(params, prompts[:3], slots=3)
    for a, b in zip(one, draw(sharded, prompts[:3], slots=3, mesh=mesh), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_progress_counts_samples_and_tokens(params, prompts):
    seen = []
    note = lambda done, total, tokens: seen.append((len(done), total, tokens))  # noqa: E731
    samples = draw(params, prompts, num_samples=2, on_progress=note)
    assert seen[-1] == (len(samples), len(samples), sum(len(s.tokens) for s in samples))
    assert all(a[0] <= b[0] and a[2] <= b[2] for a, b in itertools.pairwise(seen))


def test_no_prompts_give_no_samples(params):
    assert draw(params, []) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(min_new_tokens=11), "min_new_tokens=11"),
        (dict(stop_ids=()), "pass the tokenizer's EOS"),
        (dict(stop_ids=(24,)), "vocab_size=24"),
        (dict(max_new_tokens=250), "max_position_embeddings=256"),
        (dict(slots=0), "slots=0"),
        (dict(ids=[0]), "came with 1 ids"),
        (dict(ids=[0, 1, 2, 3, 4, 5, -1]), "prompt id -1"),
        (dict(ids=[0, 1, 2, 3, 4, 5, 2**64]), "prompt id 18446744073709551616"),
    ],
)
def test_a_bad_request_is_refused_with_its_value(params, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(params, prompts, **settings)


def test_an_empty_prompt_is_refused_by_its_id(params):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        draw(params, [np.array([3]), np.array([], np.int32)])
