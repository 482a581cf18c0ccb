"""A study expands into runs: each point of settings x grid x seeds once, each named, each a config that parses."""

import copy
import itertools
import json
import pathlib
import re

import pytest

from configs.quickstart import get_config
from sera_jax.checkpoint.code import versions
from sera_jax.config import to_dict
from sera_jax.config.identity import YOUNGER
from sera_jax.evaluation.comparison import compare
from sera_jax.evaluation.comparison_report import table
from sera_jax.experiment.methods import parse
from sera_jax.studies.plan import Study, expand, identity, load
from tests.docs_test import config_of

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STUDIES = sorted((ROOT / "studies").glob("*.py"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def study(**fields):
    return Study(**{"base": "configs/quickstart.py", **fields})


def test_expansion_is_a_bijection_between_points_and_runs():
    settings = {"published": {}, "ranked": {"sera.likelihood_weight": 1.0, "sera.ranking_reduction": "mean"}}
    grid = {"data.label_noise": (0.0, 0.2), "train.learning_rate": (1e-4, 3e-4), "sft.learning_rate": (1e-4, 6e-4)}
    runs = expand(study(settings=settings, grid=grid, seeds=(3, 1)))
    points = [
        (*settings[name].values(), *values, seed)
        for name, *values, seed in itertools.product(settings, *grid.values(), (3, 1))
    ]
    assert [tuple(run.overrides.values()) for run in runs] == points
    assert len(points) == 32
    for distinct in (lambda r: r.name, lambda r: r.folder, lambda r: (r.identity, r.seed)):
        assert len({distinct(run) for run in runs}) == 32
    assert not [run.folder for run in runs if re.search("[=, ]", run.folder)], "a mixture of data reads these"
    assert runs[0].name == "published,label_noise=0.0,train.learning_rate=0.0001,sft.learning_rate=0.0001/seed3"


def test_the_command_line_of_a_run_gives_the_config_that_it_was_planned_with():
    """Every kind of value: tuples of names and of numbers, numbers, truth values, what is unset."""
    settings = {
        "a": {"sera.arms": ("daa", "sera"), "sera.selection": "middle", "sera.band": (0.1, 0.9)},
        "b": {"sera.require_eos": False, "loss.beta": 0.5, "train.learning_rate": 1e-7, "eval.max_pairs": 10},
        "c": {"loss.name": "ipo", "loss.tau": None, "eval.temperatures": ()},
    }
    for run in expand(study(base="configs/quickstart.py:noise20", settings=settings, seeds=(7,))):
        config = to_dict(config_of("--config=configs/quickstart.py:noise20", *run.flags()))
        assert identity(config, versions()) == run.identity
        assert config["seed"] == 7
        assert config["data"]["label_noise"] == 0.2


def test_rows_outlive_a_field_that_is_younger_and_changes_nothing(monkeypatch):
    config = to_dict(config_of("--config=configs/quickstart.py"))
    before = copy.deepcopy(config)
    del before["sera"]["replay_fraction"]
    assert identity(config, versions()) != identity(before, versions())
    monkeypatch.setitem(YOUNGER, "sera.replay_fraction", 0.0)
    assert identity(config, versions()) == identity(before, versions())
    config["sera"]["replay_fraction"] = 0.5
    assert identity(config, versions()) != identity(before, versions())


def test_rows_are_of_one_run_whatever_computes_attention():
    def digest(name):
        config = to_dict(config_of("--config=configs/quickstart.py", f"--config.model.attn_implementation={name}"))
        return identity(config, versions())

    assert digest("auto") == digest("xla") == digest("splash")


def test_runs_share_a_start_exactly_where_nothing_before_the_method_differs():
    def start(**fields):
        (run,) = expand(study(settings={"": fields}))
        return run.start

    for field, value in {
        "data.label_noise": 0.4,
        "sera.rounds": 2,
        "train.learning_rate": 1e-5,
        "loss.name": "ipo",
    }.items():
        assert start(**{field: value}) == start()
    for field, value in {
        "world.cue": 0.5,
        "sft.max_steps": 3,
        "data.row_tokens": 256,
        "model.num_hidden_layers": 2,
    }.items():
        assert start(**{field: value}) != start()


def test_the_identity_is_that_of_all_seeds_and_of_the_versions_that_compute():
    first, second = expand(study(seeds=(0, 1)))
    assert first.identity == second.identity
    config = to_dict(parse(get_config()))
    code = {"numerics": "3", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "numpy": "2.1"}
    assert identity(config, code) == identity(config, {**code, "jax": "0.10.3", "numpy": "2.2"})
    assert identity(config, code) != identity(config, {**code, "jax": "0.11.0"})
    assert identity(config, code) != identity(config, {**code, "numerics": "4"})
    assert identity(config, code) == identity({**config, "workdir": "elsewhere", "seed": 9}, code)


def test_a_table_says_each_field_of_a_setting_once():
    """Also where two fields end alike, and where a value has characters that no name has."""
    grid = {"train.learning_rate": (1e-4, 3e-4), "eval.temperatures": ((0.0, 0.5), ())}
    settings = {"a": {"sft.learning_rate": 1e-3}, "b": {}}
    runs = expand(study(settings=settings, grid=grid, panels="eval.temperatures"))
    assert runs[0].setting == "a,train.learning_rate=0.0001,temperatures=0.0+0.5"
    rows = [{"setting": r.setting, "arm": "sft", "seed": 0, "varied": r.varied, "metrics": {"gold": 1.0}} for r in runs]
    shown = table(compare(json.loads(json.dumps(rows)), ["gold"], panels="eval.temperatures"))
    assert shown.count("eval.temperatures=") == 2, "the headings of the panels"
    entries = [line.split()[0] for line in shown.splitlines() if line.endswith("(1)")]
    assert entries == [f"{s},train.learning_rate={rate}" for s in "ab" for rate in (0.0001, 0.0003)] * 2
    notes = [line.rpartition(": ")[2] for line in shown.splitlines() if line.startswith("a,") and ": " in line]
    assert notes == ["sft.learning_rate=0.001"] * 4


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"grid": {"train.batchsize": (1,)}}, "config.train.batchsize is not a field; did you mean train.batch_size"),
        ({"grid": {"data.label_noise": (0.2, 2.0)}}, "label_noise=2.0: config.data.label_noise=2.0 is out of range"),
        (
            {"grid": {"data.label_noise": (0.2, 0.2)}},
            "runs of one name: label_noise=0.2/seed0 and label_noise=0.2/seed0",
        ),
        ({"settings": {"a": {}, "b": {"data.label_noise": 0.4}}}, "runs of one config: a/seed0 and b/seed0"),
        ({"settings": {"a": {"seed": 1}}}, "config.seed is set by the study"),
        ({"settings": {"a": {"sera.rounds": 2}}, "grid": {"sera.rounds": (2, 3)}}, "sera.rounds is in the grid and in"),
        ({"settings": {"a/b": {}}}, "a setting is named 'a/b'"),
        ({"metrics": ()}, r"metrics=\(\); name one at least"),
        ({"metrics": ("a:b",)}, "metric 'a:b' is a difference to a baseline; name one"),
        (
            {"arms": ("oracle_pairing",)},
            "no run has the arm 'oracle_pairing'; they have sft, daa, sera, sera_recommended",
        ),
        ({"baseline": "published"}, "baseline='published' is nothing here; choose of sft, daa, sera, sera_recommended"),
        (
            {"settings": {"a": {"sera.rounds": 2}, "b": {"loss.beta": 0.5, "sera.rounds": 4}}, "panels": "loss.beta"},
            "panels='loss.beta' is no field of the setting 'a'; .* every setting has: sera.rounds$",
        ),
        ({"seeds": (1, 1)}, r"config.seeds=\(1, 1\); give one at least, and each once"),
        ({"grid": {"sera.rounds": ()}}, "the study has no run"),
        ({"base": "configs/absent.py"}, "configs/absent.py: FileNotFoundError"),
        ({"base": "configs/quickstart.py:loud"}, r"configs/quickstart.py:\d+: ValueError: .*:loud is not a variant"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_before_anything_runs(fields, words):
    with pytest.raises(ValueError, match=words):
        expand(study(**fields))


def test_a_study_file_that_cannot_be_run_is_a_line_with_its_place(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("\ndef get_config():\n    return Study(1)\n")
    with pytest.raises(ValueError, match=r"broken.py:3: NameError: name 'Study' is not defined"):
        load(str(file))
    file.write_text("def get_config():\n    return 3\n")
    with pytest.raises(ValueError, match=r"gives a int; it must give a sera_jax.studies"):
        load(str(file))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_of_the_repository_expands_and_says_its_command(path):
    name = path.relative_to(ROOT)
    study = load(str(name))
    runs = expand(study)
    asked = {t for metric in study.metrics for t in re.findall(r"gold_by_temperature/([\d.]+)", metric)}
    temperatures = to_dict(config_of(f"--config={study.base}", *runs[0].flags()))["eval"]["temperatures"]
    assert asked <= {f"{t:g}" for t in temperatures}
    assert f"python -m sera_jax.study --config={name}" in path.read_text()


def test_the_plane_of_the_docs_is_of_seeds_that_nothing_was_chosen_on():
    for name in ("embedded_plane", "embedded_gentle"):
        runs = expand(load(f"studies/{name}.py"))
        assert len(runs) == 30
        assert {run.seed for run in runs} == set(range(10, 20))
        assert len({run.start for run in runs}) == 10
        assert {run.varied["data.label_noise"] for run in runs} == {0.0, 0.2, 0.4}


def test_the_study_of_the_docs_expands(tmp_path):
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "studies.md").read_text(), re.MULTILINE | re.DOTALL
    )
    file = tmp_path / "ranking.py"
    file.write_text(code)
    study = load(str(file))
    assert len(expand(study)) == 20
    assert (study.workdir, study.rows) == ("runs/ranking", "studies/results/ranking.jsonl")
