"""The one loop, with work that only counts: what is saved, said and kept when a step, a line or a start comes to
nothing."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sera_jax import memory
from sera_jax.checkpoint.shared import SharedPhases
from sera_jax.loops.restartable import Span, run_to_end
from sera_jax.loops.runtime import NonFinite, Preempted
from sera_jax.models.config import ModelConfig
from sera_jax.writer import METRICS
from tests.loops.kills import metrics
from tests.loops.tiny import one_device_runtime

STEPS, LINES_EVERY = 6, 10
CFG = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)


class Counting:
    """Counts its steps in an array. `fails`: what a step raises; `refused`: the step after which nothing is good."""

    unit, save_steps, keep, steps = "update", 0, 2, STEPS
    span = Span("train", "toy", 1)

    def __init__(self, run, *, fails=None, donates=False, refused=None, every=LINES_EVERY):
        self.run, self.fails, self.donates, self.refused, self.every = run, fails or {}, donates, refused, every
        self.abstract: Any = {"n": jax.ShapeDtypeStruct((), jnp.int32, sharding=self.fresh()["n"].sharding)}
        self.waiting: list[int] = []

    def fresh(self):
        return {"n": jnp.zeros((), jnp.int32)}

    def done(self, state):
        return int(state["n"])

    def step(self, state, number):
        if number in self.fails:
            if self.donates:
                state["n"].delete()
            raise self.fails[number]
        self.waiting.append(number)
        state = {"n": jnp.asarray(number)}
        if number % self.every == 0:
            self.flush(state, number)
        return state

    def flush(self, state, number):
        if self.notes(state, number)["waiting"]:
            self.run.writer.write(step=number, metrics={"mean": sum(self.waiting) / len(self.waiting)})
        self.waiting = []

    def notes(self, state, number):
        if self.refused in self.waiting and number >= self.refused:
            good = self.refused - 1
            raise NonFinite(f"update {self.refused}; update {good} is saved", ({"n": jnp.asarray(good)}, good))
        return {"waiting": [n for n in self.waiting if n <= number]}

    def take(self, notes):
        self.waiting = notes["waiting"]

    def leave(self, folder, state):
        return {"state": state}

    def close(self):
        pass


def count(workdir, stop_requested=lambda: False, save_steps=0, shared=None, **how):
    with one_device_runtime(workdir, CFG, stop_requested=stop_requested) as run:
        run.workdir.shared = shared

        def begin():
            work = Counting(run, **how)
            work.save_steps = save_steps
            return work

        return run_to_end(run, "toy", {"n": 1}, begin).product.digest


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints" / "toy").glob("[0-9]*"))


def stop_at(number):
    asked = itertools.count(1)
    return lambda: next(asked) >= number


CASES = {
    "at the last step": {},
    "at a checkpoint that is due": {"save_steps": 5},
    "at a stop": {"stop_requested": lambda: stop_at(5)},
    "where a step is stopped": {"fails": {5: Preempted("x")}},
    "where a step fails": {"fails": {5: ValueError("x")}},
    "where a step says no good state": {"fails": {5: NonFinite("x")}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_refused_update_is_found_whenever_what_waits_is_looked_at_and_the_good_state_is_saved(tmp_path, case):
    how = dict(CASES[case])
    if make := how.pop("stop_requested", None):
        how["stop_requested"] = make()
    with pytest.raises(NonFinite, match="update 4; update 3 is saved"):
        count(tmp_path / "run", refused=4, **how)
    assert saved(tmp_path / "run") == [3]
    assert count(tmp_path / "run") == count(tmp_path / "whole"), "the fault was one of the machine"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_stop_within_a_step_that_took_the_state_apart_names_the_newest_checkpoint(tmp_path):
    fails = {4: Preempted("asked")}
    with pytest.raises(Preempted, match=r"toy within update 4; .* goes on from its newest checkpoint \(none\)"):
        count(tmp_path, fails=fails, donates=True)
    with pytest.raises(Preempted, match=r"toy within update 4; .* goes on from its newest checkpoint \(update 2\)"):
        count(tmp_path, fails=fails, donates=True, save_steps=2)
    with pytest.raises(Preempted, match="stopped in toy after update 3; the same command goes on from there"):
        count(tmp_path, fails=fails)
    assert saved(tmp_path) == [2, 3]


def test_where_memory_ran_out_nothing_more_is_put_into_it(tmp_path):
    with pytest.raises(memory.OutOfMemory, match="sampling"):
        count(tmp_path, fails={4: memory.OutOfMemory("sampling ran out of memory")})
    assert saved(tmp_path) == []


def test_what_another_run_gave_while_this_one_was_stopped_brings_its_lines(tmp_path, capsys):
    """Taken into a folder that has the lines before the stop; a kill amid their being put back is mended alike."""
    shared = SharedPhases(tmp_path / "shared", ("toy",), {})
    with pytest.raises(Preempted):
        count(tmp_path / "run", stop_at(4), every=1)
    whole = count(tmp_path / "whole", shared=shared, every=1)
    assert count(tmp_path / "run", shared=shared, every=1) == whole
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    log = tmp_path / "run" / METRICS
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    assert count(tmp_path / "run", every=1) == whole
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert "warning" not in capsys.readouterr().err


def test_lines_that_were_changed_are_said_and_stay(tmp_path, capsys):
    count(tmp_path, every=1)
    log = tmp_path / METRICS
    log.write_text(changed := log.read_text().replace('"mean": 2.0', '"mean": 2.5'))
    count(tmp_path, every=1)
    assert "no longer has the lines of toy as they were written" in capsys.readouterr().err
    assert log.read_text() == changed


def test_a_checkpoint_comes_after_what_its_work_began_with(tmp_path):
    """Else a kill could leave one that is of a product which is made anew, with other bits perhaps."""
    with one_device_runtime(tmp_path, CFG) as run:
        run.workdir.writes_behind = True
        before = run.workdir.phase("before", {}, lambda folder: {"params": {"w": jnp.ones(3)}})
        begun_while_written = not (before.path / "manifest.json").exists()

        def begin():
            work = Counting(run, fails={3: memory.OutOfMemory("x")})
            work.save_steps = 2
            return work

        with pytest.raises(memory.OutOfMemory):
            run_to_end(run, "toy", {"n": 1}, begin)
        assert begun_while_written and saved(tmp_path) == [2] and (before.path / "manifest.json").exists()


def test_the_tree_that_is_kept_is_the_one_that_was_left(tmp_path):
    with one_device_runtime(tmp_path, CFG) as run:
        first, again, other = (
            run_to_end(run, name, {"n": 1}, lambda: Counting(run), kept)
            for name, kept in (("toy", "state"), ("toy", "state"), ("other", ""))
        )
        assert first.tree is not None and first.tree["n"] == STEPS
        assert again.tree is None and other.tree is None, "found on disk, and not asked for"
