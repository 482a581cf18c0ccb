"""A run on preference rows of one's own with eval.gold: what it says of gold, as the embedded world's runs do."""

import json

import pytest

from sera_jax import experiment, rankings, world
from tests.loops.tiny import tiny_config

pytest.importorskip("sacrebleu", reason="eval.gold='chrf' reads it")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work directory, summary) of the smallest run with the arm that is judged by gold."""
    root = tmp_path_factory.mktemp("real_gold")
    rows = world.make_world(world.WorldSpec(seed=1, pretrain=40, preferences=48))["preferences"]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        root / "run",
        world__name="",
        model__tokenizer_name_or_path=str(world.write_tokenizer(root / "tokenizer")),
        data__train=str(root / "pairs.jsonl"),
        data__eval_fraction=0.25,
        sera__arms=("oracle_pairing",),
        sera__rounds=2,
        eval__gold="chrf",
        eval__temperatures=(0.0, 1.0),
    )
    return root / "run", experiment.run(config)


def test_every_arm_has_gold_facts_from_0_to_1_and_a_win_rate(run):
    for facts in run[1]["arms"].values():
        assert facts["gold_ci95"][0] <= facts["gold_mean"] <= facts["gold_ci95"][1]
        assert 0 < facts["gold_mean"] < 1
        assert 0 <= facts["win_rate_vs_sft"] <= 1
        assert set(facts["gold_by_temperature"]) == {"0", "1"}
    assert run[1]["arms"]["sft"]["win_rate_vs_sft"] == 0.5


def test_pairs_that_the_gold_chose_agree_with_it_and_its_rankings_are_printed(run, capsys):
    root, summary = run
    facts = next(facts for facts in summary["rounds"] if (facts["arm"], facts["round"]) == ("oracle_pairing", 2))
    assert facts["agreement"] == {"agree": 1.0, "disagree": 0.0, "tie": 0.0}
    assert facts["added"] > 0
    assert rankings.main([str(root)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("oracle_pairing", "log pi, a token", "shortest", "gold gap"))


def test_a_run_without_rankings_is_refused_with_the_reason(run, tmp_path, capsys):
    rounds = [{name: value for name, value in facts.items() if name != "rankings"} for facts in run[1]["rounds"]]
    (tmp_path / "summary.json").write_text(json.dumps({"rounds": rounds}))
    assert rankings.main([str(tmp_path)]) == 2
    assert "no round made pairs of its own, or there is no gold reward" in capsys.readouterr().err
