"""The embedded world is fit for comparing methods: what must hold before any method is looked at.

The checks have nothing to do with selection or bootstrapping, and a seed that no published run uses. Limits are far
below what was seen when they were set, and above what chance or an unfit world gives.
"""

import dataclasses
import importlib.util
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from sera_jax import config as config_lib
from sera_jax import world
from sera_jax.checkpoint import Workdir
from sera_jax.config import SamplingGroup, TrainGroup
from sera_jax.core import Stream, rng_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.evaluation import gold, heldout
from sera_jax.experiment import starting_policy
from sera_jax.experiment.assembly import base_model, read_corpus
from sera_jax.experiment.methods import parse
from sera_jax.experiment.methods.sera import ARMS
from sera_jax.loops.rewards import implicit
from sera_jax.loops.runtime import Runtime
from sera_jax.loops.sera import sera
from sera_jax.loops.sera_study import SeraStudy
from sera_jax.loops.sft import sft
from sera_jax.losses.preference import resolve
from sera_jax.mesh import make_mesh
from sera_jax.writer import MetricWriter

pytestmark = pytest.mark.slow
SEED = 41
ROOT = pathlib.Path(__file__).resolve().parent.parent


def quickstart():
    spec = importlib.util.spec_from_file_location("configs.quickstart", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("clean")


@pytest.fixture(scope="module", params=world.AUTHORS)
def lab(request, tmp_path_factory):
    """Base and SFT model of the quickstart on clean labels in each world, and how to sample and to score them."""
    raw = quickstart()
    raw.world.name = request.param
    raw.train.num_train_epochs = 3  # with which the limits were set; the quickstart's own rounds are gentler
    raw.workdir, raw.seed, raw.log.tensorboard = str(tmp_path_factory.mktemp("lab")), SEED, False
    config = parse(raw)
    root = pathlib.Path(config.workdir)
    workdir = Workdir(root, config_lib.to_dict(config))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with MetricWriter(root, tensorboard=False) as writer, jax.set_mesh(mesh):
        corpus = read_corpus(config, workdir, lambda text: None)
        cfg, make_base = base_model(config.model, corpus.tokenizer, config.seed)
        run = Runtime(
            cfg=cfg,
            mesh=mesh,
            workdir=workdir,
            writer=writer,
            seed=config.seed,
            layout=Layout(config.data.row_tokens),
            chunk_tokens=config.train.logits_chunk_tokens,
            stop_ids=corpus.tokenizer.stop_ids,
        )
        base, start = starting_policy(config, run, corpus, make_base)

        def sample(policy, count=1, temperature=1.0):
            settings = SamplingGroup(temperature=temperature, max_new_tokens=32, slots=128)
            name = f"fitness/{policy.name.replace('/', '-')}_{count}_{temperature}"
            return run.sample(name, policy, corpus.eval_prompts, count, settings, round_=9)

        def golds(policy, **how):
            """f64[prompts, count]"""
            groups = sample(policy, **how)
            return np.array(
                [[corpus.gold(i, s.tokens) for s in g.samples] for i, g in zip(corpus.eval_prompts, groups)]
            )

        yield types.SimpleNamespace(**locals())


def demonstrations_of(lab, author, count):
    """Items by another author; the held-out prompts are the world's own, so they stay held out."""
    files = pathlib.Path(lab.config.workdir) / "phases" / "world" / "files" / "world.json"
    spec = world.WorldSpec(**json.loads(files.read_text())["spec"])
    spec = dataclasses.replace(spec, demonstrations=count, demonstrator=author, pretrain=0, preferences=0)
    tokenizer, rows = lab.corpus.tokenizer, world.make_world(spec)["demonstrations"]
    return [
        Item(r["id"], tokenizer.encode_prompt(r["prompt"]), (tokenizer.encode_response(r["prompt"], r["response"]),))
        for r in rows
    ]


def test_the_base_gives_right_answers_a_clear_share_of_its_mass(lab):
    texts = [
        (lab.corpus.tokenizer.decode(i.prompt), g.samples[0].tokens)
        for i, g in zip(lab.corpus.eval_prompts, lab.sample(lab.base))
    ]
    right = [world.marks(prompt, lab.corpus.tokenizer.decode(tokens)).right for prompt, tokens in texts]
    # half of what its text has; a random list of words is right far below 0.05
    assert np.mean(right) > world.AUTHORS[lab.config.world.name]["base"].right / 2


def test_sft_on_plenty_of_good_demonstrations_reaches_a_gold_near_one(lab):
    items = demonstrations_of(lab, "good", 4000)
    group = TrainGroup(batch_size=64, learning_rate=3e-3, max_steps=240)
    good = sft(lab.run, "good", lab.base, items, group)
    assert lab.golds(good, temperature=0.0).mean() > 0.9


def test_the_best_of_eight_answers_by_gold_is_far_above_their_mean(lab):
    golds = lab.golds(lab.start, count=8)
    assert golds.max(axis=1).mean() > golds.mean() + 0.25


@pytest.fixture(scope="module")
def daa(lab):
    """The direct alignment loss alone, on clean labels."""
    study = SeraStudy(
        run=lab.run,
        sft=lab.start,
        loss=resolve("dpo"),
        settings=dataclasses.replace(lab.config.sera, rounds=3),
        train=lab.config.train,
        sampling=lab.config.sampling,
        pool=lab.corpus.train,
        prompts=lab.corpus.prompts,
        ranking=implicit(resolve("dpo")),
        text=lab.corpus.tokenizer.decode_response,
        evaluate=lambda policy, round_: {},
        gold=lab.corpus.gold,
    )
    return sera(study, "daa", dataclasses.replace(study.settings, **ARMS["daa"].how))[0]


def test_a_daa_on_clean_labels_improves_clearly_over_sft(lab, daa):
    gain = (lab.golds(daa, count=4) - lab.golds(lab.start, count=4)).mean(axis=1)  # paired by prompt
    assert gain.mean() > 0.08
    assert gold.ci95(gain)[0] > 0


def test_where_habits_are_wrong_sharpening_is_no_gain_and_preferences_are(lab, daa):
    if lab.config.world.name != "wrong_habits":
        pytest.skip("a law of the world whose habits are wrong")
    start, aligned = (lab.golds(policy, temperature=0.0)[:, 0] for policy in (lab.start, daa))
    assert start.mean() <= 0.6
    assert aligned.mean() >= start.mean() + 0.1
    assert gold.ci95(aligned - start)[0] > 0


def test_the_coherent_reward_of_the_sft_model_ranks_good_above_bad_over_chance(lab):
    items = [pair.item for pair in lab.corpus.heldout]
    sft_logp, base_logp = (np.array(lab.run.score(f"{p.name}/fitness", p, items)) for p in (lab.start, lab.base))
    reward = sft_logp - base_logp  # [pairs, (chosen, rejected)]
    lengths = np.array([[len(r) for r in item.responses] for item in items])
    facts = heldout.facts(reward[:, 0], reward[:, 1], lengths[:, 0], lengths[:, 1])
    assert facts["heldout_accuracy"] > 0.5 + 3 * 0.5 / np.sqrt(len(items))

    groups, golds = lab.sample(lab.start, count=8), lab.golds(lab.start, count=8)
    ours, bases = (lab.run.score_candidates(f"{p.name}/fitness8", p, groups) for p in (lab.start, lab.base))
    best = (np.array(ours) - np.array(bases)).argmax(axis=1)
    picked = golds[np.arange(len(golds)), best]
    drawn = golds[np.arange(len(golds)), rng_for(SEED, Stream.SPLIT).integers(8, size=len(golds))]
    assert picked.mean() > golds.mean() + 2 * (picked - drawn).std() / np.sqrt(len(golds))
