"""The config is refused at the door: every field, its type, its choices, its range, and the rules that join fields."""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import typing

import ml_collections
import pytest

from configs.base import get_config
from sera_jax.config import Config, check_field, last_overrides, to_config_dict, to_dict
from sera_jax.config import fields as fields_lib
from sera_jax.evaluation import look
from sera_jax.experiment.methods import METHODS, parse
from sera_jax.experiment.methods.sera import SERA, loss_of_arm
from sera_jax.losses.preference import LOSSES, resolve
from sera_jax.models.families import FAMILIES
from sera_jax.world import AUTHORS

ROOT = pathlib.Path(__file__).resolve().parent.parent


SRPPO = {
    "method": "srppo",
    "data__train": "",
    "data__demonstrations": "answers.jsonl",
    "sampling__temperature": 1.0,
    "sampling__min_new_tokens": 0,
}


# Fields that are read only where something reads them, each with a value that is no default.
REWARD_GUARDS = (("sera__min_margin", 0.5), ("sera__agreement", "rewards"), ("sera__length_alpha", 0.1))
OTHER_GUARDS = (("sera__bootstrap_band", (0.0, 0.9)), ("sera__support_quantile", 0.1), ("sera__stop_kl", 5.0))
RANKING = (("sera__likelihood_weight", 0.5), ("sera__ranking_reduction", "mean"))
OF_ROUNDS = (
    *OTHER_GUARDS,
    ("sera__agreement", "policies"),
    ("sera__judge", "chance"),
    ("sera__bootstrap_from", "sft"),
    ("sera__ensemble_gamma", 0.0),
    ("sera__reference", "previous"),
    ("sera__replay_fraction", 0.5),
    ("sera__label_smoothing", 0.2),
    ("sera__stop_margin_std", 9.0),
    ("sera__stop_chosen_logratio", 5.0),
)


def raw_config(**changes):
    """A ConfigDict that parses, with changes (`group__field`)."""
    raw = get_config()
    raw.workdir, raw.data.train = "runs/x", "pairs.jsonl"
    raw.data.row_tokens, raw.data.max_prompt_length = 1024, 512
    raw.sampling.max_new_tokens, raw.sampling.min_new_tokens = 256, 1
    raw.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return raw


def refused(**changes):
    with pytest.raises(ValueError) as error:
        parse(raw_config(**changes))
    return str(error.value)


def srppo_refused(**changes):
    return refused(**{**SRPPO, **changes})


def fields(kind=Config, prefix=""):
    """(path, type, what its field says it may be) of every leaf."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], field.metadata


FIELDS = {path: kind for path, kind, _ in fields()}
CHOICES = {path: allowed[fields_lib.CHOICES] for path, _, allowed in fields() if fields_lib.CHOICES in allowed}
RANGES = {path: allowed[fields_lib.RANGE] for path, _, allowed in fields() if fields_lib.RANGE in allowed}


def value_at(config, path):
    for part in path.split("."):
        config = getattr(config, part)
    return config


def test_the_defaults_come_back_as_they_are_and_the_dict_is_locked():
    raw = to_config_dict(Config(workdir="runs/x", data=dataclasses.replace(Config().data, train="a.jsonl")))
    assert parse(raw) == dataclasses.replace(
        Config(), workdir="runs/x", data=dataclasses.replace(Config().data, train="a.jsonl")
    )
    with pytest.raises(AttributeError, match="keep_fraction"):
        raw.sera.keep_fractoin = 0.5
    assert to_dict(parse(raw))["sera"]["keep_fraction"] == 0.7


def test_an_unknown_method_is_refused_with_the_choices():
    message = refused(method="nonsense")
    assert "config.method='nonsense'" in message
    assert all(repr(name) in message for name in METHODS)


@pytest.mark.parametrize("path", CHOICES)
def test_a_value_that_is_no_choice_is_refused_with_the_choices(path):
    message = refused(**{path.replace(".", "__"): "nonsense"})
    assert f"config.{path}='nonsense'" in message
    assert all(repr(choice) in message for choice in CHOICES[path])


@pytest.mark.parametrize("path", CHOICES)
def test_every_choice_is_taken(path):
    for choice in CHOICES[path]:
        changes = {path.replace(".", "__"): choice}
        if choice == "threshold":
            changes["sera__threshold"] = 0.5
        if path == "world.name":
            changes["data__train"] = "" if choice else "pairs.jsonl"
        if choice == "sft":
            changes["sera__likelihood_weight"] = 1.0
        if choice == "gold":
            changes |= {"data__train": "", "world__name": "habits"}
        assert value_at(parse(raw_config(**changes)), path) == choice


@pytest.mark.parametrize("path", RANGES)
def test_a_number_out_of_range_is_refused_with_the_range(path):
    low, high, closed = RANGES[path]
    kind = int if FIELDS[path] is int else float
    outside = [low - 1] + ([] if closed else [low]) + ([] if math.isinf(high) else [high + 1])
    for value in outside:
        message = refused(**{path.replace(".", "__"): kind(value)})
        assert f"config.{path}={kind(value)!r} is out of range" in message
        assert str(low) in message and str(high) in message


@pytest.mark.parametrize("path", RANGES)
def test_the_limits_of_a_range_are_taken(path):
    low, high, closed = RANGES[path]
    kind = int if FIELDS[path] is int else float
    together = {
        "data.max_prompt_length": {"sera__rounds": 1},
        "data.row_tokens": {"data__max_prompt_length": 1, "sera__rounds": 1},
        "sampling.max_new_tokens": {"sampling__min_new_tokens": 0},
        "sera.stop_unsupported": {"sera__support_quantile": 0.1},
        "sera.label_smoothing": {"sera__arms": ("cdpo",)},
    }
    inside = ([low] if closed else []) + ([] if math.isinf(high) else [high])
    for value in inside:
        config = parse(raw_config(**together.get(path, {}), **{path.replace(".", "__"): kind(value)}))
        assert value_at(config, path) == value


@pytest.mark.parametrize("path", [p for p, kind in FIELDS.items() if kind in (int, float, str, bool)])
def test_a_value_of_another_type_is_refused_by_field(path):
    kind = FIELDS[path]
    wrong = {int: 1.5, float: "1.5", str: 3, bool: 1}[kind]
    raw = raw_config()
    with raw.ignore_type():
        raw.update_from_flattened_dict({path: wrong})
    with pytest.raises(ValueError, match=rf"config\.{path}={wrong!r} is a \w+; it must be a {kind.__name__}"):
        parse(raw)


@pytest.mark.parametrize("path", [p for p, kind in FIELDS.items() if kind is float])
def test_what_is_not_a_finite_number_is_refused(path):
    for value in (math.nan, math.inf):
        assert f"config.{path}={value!r} is not a finite number" in refused(**{path.replace(".", "__"): value})


def test_an_integer_beyond_32_bits_is_refused_whatever_its_field():
    for path in (path for path, kind in FIELDS.items() if kind is int):
        value = 2**31
        assert f"config.{path}={value} is" in refused(**{path.replace(".", "__"): value})


def test_an_integer_serves_as_a_float_but_not_the_other_way_round_and_true_is_no_number():
    raw = raw_config()
    with raw.ignore_type():
        raw.train.learning_rate = 1
    value = parse(raw).train.learning_rate
    assert (value, type(value)) == (1.0, float)
    for path, wrong in (("train.learning_rate", True), ("train.batch_size", True), ("train.batch_size", 8.0)):
        plain = raw_config().to_dict()
        plain["train"][path.split(".")[1]] = wrong
        raw = ml_collections.ConfigDict(plain)
        with pytest.raises(ValueError, match=rf"config\.{path}={wrong!r}"):
            parse(raw)


def test_an_unset_field_stays_unset():
    config = parse(raw_config())
    unset = [path for path, kind in FIELDS.items() if value_at(config, path) is None]
    assert {"loss.beta", "sera.threshold", "sera.band", "sera.min_margin"} <= set(unset)


@pytest.mark.parametrize("given", ["daa,sera", "daa, sera", ("daa", "sera"), ["daa", "sera"], ("daa,sera",)])
def test_arms_may_be_a_string_with_commas(given):
    raw = raw_config()
    with raw.ignore_type():
        raw.sera.arms = given
    assert parse(raw).sera.arms == ("daa", "sera")


@pytest.mark.parametrize("group, known", [(m.group, tuple(m.arms)) for m in METHODS.values()])
@pytest.mark.parametrize("given", [("dpo",), "twice", ()], ids=str)
def test_unknown_repeated_or_no_arms_are_refused_with_the_choices(group, known, given):
    given = known[:1] * 2 if given == "twice" else given
    message = refused(**{f"{group}__arms": given})
    assert f"config.{group}.arms={given!r}" in message
    assert all(arm in message for arm in known)


def test_a_band_is_two_rising_quantiles_of_the_middle_rule():
    config = parse(raw_config(sera__selection="middle", sera__band=(0, 0.5)))
    assert config.sera.band == (0.0, 0.5)
    for band in ((0.5, 0.2), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        message = refused(sera__selection="middle", sera__band=band)
        assert repr(tuple(map(float, band))) in message and "0 <= low < high <= 1" in message
    assert "must hold 2 values" in refused(sera__selection="middle", sera__band=(0.1, 0.2, 0.3))
    assert "selection='middle' only, but selection='top'" in refused(sera__band=(0.1, 0.5))


def test_a_threshold_belongs_to_the_threshold_rule_and_the_rule_needs_it():
    assert parse(raw_config(sera__selection="threshold", sera__threshold=-1.0)).sera.threshold == -1.0
    assert "needs config.sera.threshold" in refused(sera__selection="threshold")
    assert "config.sera.threshold=1.0 is read by selection='threshold' only" in refused(sera__threshold=1.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"workdir": ""}, ["config.workdir", "--config.workdir="]),
        ({"workdir": "gs://bucket/run"}, ["config.workdir=gs://bucket/run is an address", "mount the bucket"]),
        ({"model__sft_model_path": "hf://me/sft"}, ["config.model.sft_model_path=hf://me/sft is an address"]),
        ({"data__train": ""}, ["config.data.train", "--config.data.train="]),
        ({"world__name": "habits"}, ["config.data.train='pairs.jsonl'", "config.world.name='habits'", "empty one"]),
        ({"sampling__min_new_tokens": 300}, ["min_new_tokens=300", "max_new_tokens=256"]),
        ({"data__max_prompt_length": 1024}, ["max_prompt_length=1024", "row_tokens=1024", "raise row_tokens"]),
        ({"sampling__max_new_tokens": 257}, ["max_new_tokens=257", "1026 tokens", "row_tokens=1024"]),
        ({"sft__logits_chunk_tokens": 512}, ["config.sft.logits_chunk_tokens=512", "train.logits_chunk_tokens=0"]),
        ({"eval__temperatures": (0.0, 1.0, 1.0)}, ["config.eval.temperatures=(0.0, 1.0, 1.0)", "each of them once"]),
        ({"eval__temperatures": (-0.5,)}, ["config.eval.temperatures=(-0.5,)", "none below 0"]),
        ({"sera__bootstrap_band": (0.9, 0.1)}, ["config.sera.bootstrap_band=(0.9, 0.1)", "0 <= low < high <= 1"]),
        ({"sera__judge": "gold"}, ["config.sera.judge='gold'", "config.world.name", "leave them out"]),
        ({"sera__arms": ("sera", "oracle_pairing")}, ["('sera', 'oracle_pairing')", "config.eval.gold='chrf'"]),
        (
            {"sera__judge": "gold", "eval__gold": "chrf", "data__prompts": "new.jsonl"},
            ["config.sera.judge='gold'", "config.data.prompts='new.jsonl'", "empty data.prompts"],
        ),
        (
            {"eval__gold": "chrf", "data__train": "", "world__name": "habits"},
            ["config.eval.gold='chrf'", "config.world.name='habits'", "empty one of them"],
        ),
        ({"world__heldout_tasks": ("last",)}, ["config.world.heldout_tasks=('last',)", "without config.world.name"]),
        ({"data__share_prompt": False}, ["1536 tokens", "row_tokens=1024"]),
        (
            {"sera__keep_rule": "mixture", "sera__selection": "threshold", "sera__threshold": 0.5},
            ["config.sera.keep_rule='mixture' is not read with selection='threshold'", "'fraction'"],
        ),
        ({"sera__keep_rule": "mixture", "sera__selection": "none"}, ["keep_rule='mixture'", "selection='none'"]),
        ({"sera__label_smoothing": 0.2}, ["config.sera.label_smoothing=0.2", "arms=('sera',)"]),
        (
            {"sera__arms": ("cdpo", "robust_dpo"), "loss__name": "ipo"},
            ["config.loss.name='ipo'", "cdpo and robust_dpo are of DPO", "leave them out"],
        ),
        (
            {"sera__arms": ("sera", "cdpo"), "data__label_noise": 0.5},
            ["config.data.label_noise=0.5", "cdpo need a share", "config.sera.label_smoothing"],
        ),
        ({"sera__stop_unsupported": 0.5}, ["config.sera.stop_unsupported=0.5", "support_quantile=0"]),
        (
            {"sera__stop_kl": 5.0, "sera__bootstrap_from": "sft", "sera__likelihood_weight": 1.0},
            ["config.sera.stop_kl=5.0", "bootstrap_from='sft'"],
        ),
        ({"sera__replay_fraction": 0.5, "sera__selection": "none"}, ["replay_fraction=0.5", "selection='none'"]),
        (
            {"sera__keep_rule": "mixture", "sera__selection": "middle", "sera__band": (0.1, 0.9)},
            ["keep_rule='mixture'", "band=(0.1, 0.9)"],
        ),
        (
            {"sera__bootstrap_from": "sft"},
            ["config.sera.bootstrap_from='sft'", "likelihood_weight=0.0", "raise likelihood_weight"],
        ),
        *(
            ({field: value, **unread}, [f"config.{field.replace('__', '.')}={value!r} is not read with {where}"])
            for unread, where, fields in (
                ({"sera__bootstrap_fraction": 0.0}, "bootstrap_fraction=0", (*REWARD_GUARDS, *OTHER_GUARDS)),
                ({"sera__judge": "chance"}, "judge='chance'", (*REWARD_GUARDS, *RANKING)),
                ({"method": "online_dpo"}, "method='online_dpo'", OF_ROUNDS),
            )
            for field, value in fields
        ),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_are_refused_with_both_values(changes, words):
    message = refused(**changes)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("field, value", REWARD_GUARDS)
def test_a_guard_rail_that_reads_a_reward_holds_in_the_arms_that_have_one(field, value):
    """And not in the controls, whose judge is another."""
    config = parse(raw_config(**{field: value}, sera__arms=("sera", "random_pairing", "bootstrap_only")))
    assert value_at(config, field.replace("__", ".")) == value
    of = {arm: dataclasses.replace(config.sera, **SERA.arms[arm].how) for arm in (*config.sera.arms, "oracle_pairing")}
    name = field.removeprefix("sera__")
    assert {arm: getattr(settings, name) == value for arm, settings in of.items()} == {
        "sera": True, "random_pairing": False, "bootstrap_only": True, "oracle_pairing": False
    }  # fmt: skip


@pytest.mark.parametrize("arm", ["sera_recommended", "sera_anchored", "bootstrap_only_likelihood", "sft_likelier_of_4"])
def test_an_arm_that_is_named_after_a_ranking_has_it_whatever_the_group_says(arm):
    other = {"sera__judge": "chance", "sera__bootstrap_from": "sft"}
    given = parse(raw_config(**other, sera__arms=(arm,))).sera
    settings = dataclasses.replace(given, **SERA.arms[arm].how)
    from_sft = arm == "sft_likelier_of_4"
    assert (settings.judge, settings.bootstrap_from) == ("policy", "sft" if from_sft else "policy")
    assert (settings.likelihood_weight, settings.ranking_reduction) == (1.0, "mean")


@pytest.mark.parametrize(
    "changes, told", [({}, 0.1), ({"data__label_noise": 0.3}, 0.3), ({"sera__label_smoothing": 0.4}, 0.4)]
)
def test_the_noise_aware_arms_have_the_loss_of_the_run_but_for_what_they_are_told(changes, told):
    arms = {"sera__arms": ("daa", "cdpo", "robust_dpo"), "loss__beta": 0.3, "loss__nll_coef": 0.05}
    config = parse(raw_config(**arms, **changes))
    losses = {arm: loss_of_arm(config, arm) for arm in config.sera.arms}
    assert losses == {
        "daa": resolve("dpo", beta=0.3, nll_coef=0.05),
        "cdpo": resolve("dpo", beta=0.3, nll_coef=0.05, label_smoothing=told),
        "robust_dpo": resolve("robust", beta=0.3, nll_coef=0.05, label_smoothing=told),
    }
    assert f"; cdpo: {losses['cdpo']}; robust_dpo: {losses['robust_dpo']}" in SERA.announce(config)


@pytest.mark.parametrize(
    "changes, weight",
    [({}, 0.2), ({"loss__nll_coef": 0.05}, 0.05), ({"loss__nll_coef": 0.0}, 0.0), ({"loss__name": "slic_hf"}, 0.1)],
)
def test_the_anchored_arm_anchors_its_loss_where_nobody_has_said_how(changes, weight):
    config = parse(raw_config(sera__arms=("daa", "sera_anchored"), **changes))
    daa, own = (loss_of_arm(config, arm) for arm in config.sera.arms)
    assert (own.name, dict(own.hyper)) == (daa.name, dict(daa.hyper) | {"nll_coef": weight})
    assert (f"; sera_anchored: {own}" in SERA.announce(config)) == (own != daa)


def test_a_gold_reward_is_missed_only_by_arms_that_judge_by_it():
    for free in ({"sera__arms": ("daa", "selection_only")}, {"sera__rounds": 1}, {"sera__bootstrap_fraction": 0.0}):
        parse(raw_config(sera__judge="gold", **free))
    parse(raw_config(sera__arms=("sera", "oracle_pairing"), eval__gold="chrf"))
    parse(raw_config(sera__arms=("sera", "oracle_pairing"), eval__gold="sentiment", data__prompts="new.jsonl"))


def test_every_arm_of_sera_has_a_colour_and_a_marker_of_its_own():
    looks = [arm.look for arm in SERA.arms.values()]
    assert len({of.colour for of in looks} | {look.GREY}) == len(looks) + 1, "grey is the SFT model's"
    assert len({of.marker for of in looks}) == len(looks)


def test_the_length_of_sampled_pairs_matters_only_where_pairs_are_sampled():
    long = {"sampling__max_new_tokens": 1000}
    for free in ({"sera__rounds": 1}, {"sera__bootstrap_fraction": 0.0}, {"sera__arms": ("daa", "selection_only")}):
        parse(raw_config(**long, **free))


def test_self_rewarding_ppo_needs_no_pairs_and_its_defaults_suit_each_other():
    config = parse(raw_config(**SRPPO))
    assert (config.method, config.data.train, config.ppo) == ("srppo", "", Config().ppo)
    parse(raw_config(**SRPPO, data__prompts="new.jsonl", ppo__prompt_overlap=0.5))
    parse(raw_config(**{**SRPPO, "data__demonstrations": ""}, world__name="habits"))


def test_preference_pairs_and_their_noise_are_for_the_arm_with_a_reward_model():
    noisy = {**SRPPO, "data__train": "pairs.jsonl", "data__label_noise": 0.2}
    config = parse(raw_config(**noisy, ppo__arms=("srppo", "ppo_reward_model")))
    assert config.reward_model == Config().reward_model


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data__train": "pairs.jsonl"}, ["config.data.train='pairs.jsonl'", "config.data.demonstrations"]),
        ({"data__demonstrations": ""}, ["config.data.demonstrations=''", "exactly one"]),
        ({"world__name": "habits"}, ["config.data.demonstrations='answers.jsonl'", "config.world.name='habits'"]),
        ({"data__label_noise": 0.2}, ["config.data.label_noise=0.2", "set it to 0"]),
        ({"ppo__arms": ("ppo_reward_model",)}, ["config.data.train is empty", "--config.data.train=pairs.jsonl"]),
        (
            {
                "data__demonstrations": "",
                "world__name": "habits",
                "world__preferences": 0,
                "ppo__arms": ("ppo_reward_model",),
            },
            ["config.world.preferences=0", "take that arm out"],
        ),
        ({"model__sft_model_path": "sft"}, ["config.model.sft_model_path='sft'", "config.model.model_name_or_path"]),
        ({"ppo__prompt_overlap": 0.5}, ["config.ppo.prompt_overlap=0.5", "config.data.prompts=''"]),
        (
            {"data__demonstrations": "", "world__name": "habits", "ppo__prompt_overlap": 0.5},
            ["config.ppo.prompt_overlap=0.5", "config.world.prompts=0"],
        ),
        ({"sampling__temperature": 0.7}, ["temperature=0.7", "set temperature=1"]),
        ({"sampling__top_p": 0.9}, ["top_p=0.9", "top_p=1"]),
        ({"sampling__top_k": 5}, ["top_k=5", "top_k=0"]),
        ({"sampling__min_new_tokens": 1}, ["min_new_tokens=1", "min_new_tokens=0"]),
        ({"train__batch_size": 6}, ["config.train.batch_size=6", "num_mini_batches=4", "a multiple of 4"]),
        ({"ppo__num_samples": 3}, ["batch_size=64", "num_samples=3", "a multiple of 12"]),
        ({"ppo__num_samples": 4}, ["its 4 responses may have 1536 tokens", "row_tokens=1024"]),
        ({"eval__max_new_tokens": 600}, ["config.eval.max_new_tokens=600", "1112 tokens", "row_tokens=1024"]),
        ({"ppo__arms": ("sft_longer", "sft_equal_compute")}, ["sft_equal_compute", "add srppo to the arms"]),
        ({"train__max_steps": 5}, ["config.train.max_steps=5", "config.ppo.iterations"]),
        ({"train__num_train_epochs": 2}, ["config.train.num_train_epochs=2", "config.ppo.iterations"]),
        ({"ppo__kl_in": "loss"}, ["config.ppo.kl_in='loss'", "kl_estimator='k1'", "use k2 or k3"]),
        (
            {"ppo__kl_controller": "adaptive", "ppo__kl_horizon": 12.0},
            ["config.ppo.kl_horizon=12.0", "config.train.batch_size=64", "above batch_size / 5 = 12.8"],
        ),
        (
            {"ppo__critic": "head", "ppo__critic_warmup_iterations": 2, "train__weight_decay": 0.1},
            ["config.train.weight_decay=0.1", "ppo.critic_warmup_iterations=2", "set one of them to 0"],
        ),
        (
            {"ppo__critic": "head", "ppo__critic_learning_rate": 1e-5},
            ["config.ppo.critic_learning_rate=1e-05", "critic='model' only"],
        ),
        (
            {"ppo__critic_warmup_iterations": 100},
            ["config.ppo.critic_warmup_iterations=100", "ppo.iterations=100", "lower it"],
        ),
    ],
    ids=str,
)
def test_what_self_rewarding_ppo_cannot_do_is_refused_with_the_way_out(changes, words):
    message = srppo_refused(**changes)
    assert [word for word in words if word not in message] == []


def test_the_rules_of_one_method_do_not_bind_the_other():
    parse(raw_config(ppo__kl_in="loss", train__max_steps=5, data__label_noise=0.2))
    parse(raw_config(**SRPPO, sera__selection="threshold"))


def test_responses_with_prompts_of_their_own_must_fit_a_row_together():
    two = {"data__max_prompt_length": 400, "sampling__max_new_tokens": 200, "ppo__num_samples": 2}
    parse(raw_config(**SRPPO, **two))
    assert "may have 1200 tokens" in srppo_refused(**two, data__share_prompt=False)


@pytest.mark.parametrize(
    "pattern, words",
    [("(", ["answer_pattern='('", "no regular expression"]), (r"\d", ["0 groups"]), (r"(\d)(\d)", ["2 groups"])],
)
def test_an_answer_pattern_marks_the_answer_with_one_group(pattern, words):
    parse(raw_config(eval__answer_pattern=r"####\s*(-?[\d,]+)"))
    message = refused(eval__answer_pattern=pattern)
    assert [word for word in words if word not in message] == []


def test_a_missing_group_or_field_and_an_unknown_one_are_refused():
    raw = ml_collections.ConfigDict(raw_config().to_dict())
    raw.sera.keep_fractoin = 0.5
    with pytest.raises(ValueError, match=r"config\.sera\.keep_fractoin is not a field; did you mean sera\.keep_frac"):
        parse(raw)
    del raw.sera["keep_fractoin"], raw.sera["rounds"]
    with pytest.raises(ValueError, match=r"config\.sera\.rounds is missing; start from configs/base\.py"):
        parse(raw)
    with raw.ignore_type():
        raw.sera = 3
    with pytest.raises(ValueError, match=r"config\.sera=3 must be a group"):
        parse(raw)


def test_a_field_is_checked_by_its_path():
    for path in (*FIELDS, "sera"):
        check_field(path)
    for path, hint in {
        "sera.keep_fractoin": "did you mean sera.keep_fraction",
        "trian.batch_size": "did you mean train",
        "zzz": "fields here: workdir, seed",
        "seed.x": "config.seed has no parts",
        "beta": r"did you mean loss\.beta\?",
        "train.rounds": r"did you mean sera\.rounds\?",
        "learning_rate": r"did you mean pretrain\.learning_rate or sft\.learning_rate or train\.learning_rate or ",
    }.items():
        with pytest.raises(ValueError, match=hint):
            check_field(path)


def test_the_command_line_says_a_field_last_and_may_unset_an_optional_one():
    given = ["main", "--config=a.py", "--config.sera.arms=daa", "--config.loss.beta=1", "--config.seed=None", "--x"]
    again = ["--config.sera.arms=sera,daa", "--config.loss.beta=None", "--config.sera.band=unset"]
    kept = ["main", "--config=a.py", "--config.seed=None", "--x", "--config.sera.arms=sera,daa"]
    assert last_overrides([*given, *again]) == (kept, ["loss.beta", "sera.band"])
    assert last_overrides([*again, *given]) == (
        ["main", "--config=a.py", "--config.sera.arms=daa", "--config.loss.beta=1", "--config.seed=None", "--x"],
        ["sera.band"],
    )
    with pytest.raises(ValueError, match=r"did you mean loss\.beta"):
        last_overrides(["--config.beta=None"])


def test_the_families_and_worlds_of_the_config_are_those_that_there_are():
    assert set(CHOICES["model.family"]) <= set(FAMILIES)  # a model from scratch is a Llama
    assert CHOICES["world.name"] == ("", *AUTHORS)


def test_the_fields_of_the_loss_are_what_the_losses_read():
    group = {path.removeprefix("loss.") for path in FIELDS if path.startswith("loss.")} - {"name"}
    assert group == {name for spec in LOSSES.values() for name in spec.hyper}
    for name in LOSSES:
        resolve(**dataclasses.asdict(parse(raw_config(loss__name=name)).loss))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_parses(path):
    scope = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    raw = scope["get_config"]()
    raw.workdir = raw.workdir or "runs/x"
    if raw.method == "sera" and not raw.world.name and not raw.data.train:
        raw.data.train = "pairs.jsonl"
    parse(raw)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.sera.keep_fractoin=1"], ["config.sera.keep_fractoin", "did you mean sera.keep_fraction?"]),
        (["--config.train.batch_size=x"], ["--config.train.batch_size=x"]),
        (["--config.sera.selection=best"], ["config.sera.selection='best'", "'top', 'bottom'"]),
        (["--config.data.train=absent.jsonl"], ["config.data.train='absent.jsonl'", "does not exist"]),
        (["--config.loss.tau=0.1"], ["'dpo' does not read tau", "beta, label_smoothing"]),
    ],
    ids=str,
)
def test_the_command_refuses_with_code_2_before_any_work(tmp_path, flags, words):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "sera_jax.main", "--config=configs/quickstart.py", f"--config.workdir={workdir}"]
    if "data.train" in flags[0]:
        command += ["--config.world.name="]
    done = subprocess.run([*command, *flags], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert [word for word in words if word not in done.stderr] == []
    assert "Traceback" not in done.stderr
    assert not (workdir / "phases").exists()
