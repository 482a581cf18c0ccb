"""What of held-out and benchmark prompts a run finds in its rows, says, and remembers."""

import json

import pytest

from sera_jax import world
from sera_jax.checkpoint import Workdir
from sera_jax.data.report import TooManyBadRows
from sera_jax.experiment import overlaps
from sera_jax.experiment.assembly import check_sources, read_corpus
from tests.loops.tiny import tiny_srppo

ASKED = "repeat : owl elm oak ash fig pear hat sock boot lute harp drum rake saw axe drill"
OTHER = "last of : pear hat owl elm oak fig ash sock drill boot lute axe harp drum rake saw"


@pytest.fixture
def config(tmp_path):
    """A config whose files hold the given rows."""
    folder = world.write_tokenizer(tmp_path / "tokenizer")

    def write(**rows):
        files = {name: tmp_path / f"{name}.jsonl" for name in rows}
        for name, entries in rows.items():
            files[name].write_text("".join(json.dumps(row) + "\n" for row in entries))
        return tiny_srppo(
            tmp_path / "run",
            world__name="",
            model__tokenizer_name_or_path=str(folder),
            **{f"data__{name}": str(path) for name, path in files.items()},
        )

    return write


def read(config, root):
    said = []
    return read_corpus(config, Workdir(root, {}), said.append), "\n".join(said)


def demonstrations(*prompts):
    more = [{"prompt": f"repeat : owl {word}", "response": word} for word in ("elm", "oak", "ash", "fig", "hat")]
    return [*more, *({"prompt": prompt, "response": "owl"} for prompt in prompts)]


def test_what_is_left_out_is_not_found_and_what_is_nearly_the_same_is(config, tmp_path):
    held = [{"prompt": ASKED, "response": "owl"}, {"prompt": OTHER, "response": "saw"}]
    near = f"{OTHER} tin"
    asked = config(
        eval=held,
        demonstrations=demonstrations(ASKED, ASKED.replace("owl elm", "owl ; elm"), near, near),
        benchmarks=[{"prompt": near}, {"question_id": 1, "turns": ["name : axe animal", "another"]}],
    )
    corpus, said = read(asked, tmp_path / "run")
    assert corpus.held_out_rows["demonstrations"] == 1
    found = corpus.contamination["demonstrations"]
    name = asked.data.benchmarks
    assert found["data.eval"] == {"prompts": 2, "exact": 1, "ngram": 1, "common": 0, "rows": 3}
    assert found[name] == {"prompts": 2, "exact": 1, "ngram": 0, "common": 0, "rows": 2}
    assert f"2 prompts of {name}, of which stand in rows that are trained on" in said
    assert "  1 exactly and 1 by 13 words, in 3 of 8 rows of data.demonstrations" in said
    kept = json.loads((tmp_path / "run" / "data" / overlaps.RECORD).read_text())["facts"]["demonstrations"]
    assert (kept["rows"], kept["prompts"]) == (len(corpus.demonstrations), 7)


def test_a_share_that_is_held_out_by_the_run_is_looked_for_in_the_rest(config, tmp_path):
    rows = demonstrations(*(f"{ASKED} {a} {b}" for a in ("tin", "pan", "jar") for b in ("cow", "dog", "hen", "pig")))
    corpus, _ = read(config(demonstrations=rows), tmp_path / "run")
    held, trained = len(corpus.heldout_demonstrations), len(corpus.demonstrations)
    assert 0 < held < trained
    found = corpus.contamination["demonstrations"]["data.eval_fraction"]
    assert found["prompts"] == held
    assert found["exact"] == 0
    assert found["ngram"] + found["common"] > 0, "all but the last two words are the same"


def test_it_is_done_once_for_a_work_directory_unless_a_file_changes(config, tmp_path, monkeypatch):
    asked = config(eval=[{"prompt": ASKED, "response": "owl"}], demonstrations=demonstrations(f"{ASKED} tin"))
    first, said = read(asked, tmp_path / "run")
    looked = []
    whole = overlaps.look
    monkeypatch.setattr(overlaps, "look", lambda looking: looked.append(1) or whole(looking))
    again, said_again = read(asked, tmp_path / "run")
    assert not looked
    assert (again.contamination, said_again) == (first.contamination, said)
    changed = config(eval=[{"prompt": OTHER, "response": "owl"}], demonstrations=demonstrations(f"{ASKED} tin"))
    other, _ = read(changed, tmp_path / "run")
    assert looked
    assert other.contamination["demonstrations"]["data.eval"]["ngram"] == 0
    assert first.contamination["demonstrations"]["data.eval"]["ngram"] == 1


def test_a_benchmark_that_is_not_there_or_holds_no_prompts_is_refused_by_name(config, tmp_path):
    asked = config(demonstrations=demonstrations(), benchmarks=[{"nothing": 1}])
    with pytest.raises(TooManyBadRows, match=r"data\.benchmarks: nothing usable in"):
        read(asked, tmp_path / "run")
    (tmp_path / "benchmarks.jsonl").unlink()
    with pytest.raises(ValueError, match=r"config\.data\.benchmarks=.* does not exist"):
        check_sources(asked.data, asked.model)
