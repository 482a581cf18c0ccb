"""A work directory with one damaged file: the damage is found, or it is harmless; never does a run end otherwise."""

import collections
import dataclasses
import random

import pytest

from tests.damage import (
    KINDS,
    OUTCOMES,
    command,
    copied,
    facts,
    files_by_kind,
    flip,
    interrupted,
    kind_of,
    outcome,
    shorten,
)
from tests.loops.tiny import tiny_config, tiny_srppo

pytestmark = pytest.mark.slow
SHORT = {"pretrain__max_steps": 2, "sft__max_steps": 2, "train__save_steps": 1, "log__rollout_iterations": 1}
METHODS = {
    "sera": (tiny_config, {"sera__rounds": 2, "sera__arms": ("sera",), "train__max_steps": 3}, "sera/round2/1"),
    "srppo": (tiny_srppo, {"ppo__iterations": 4, "ppo__eval_iterations": 2}, "srppo/iteration4/3"),
}
COUNTS = {"finished": (60, 18), "interrupted": (40, 12)}  # flipped bits, shortened files; of either method


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By name: the config, and the folder, of a finished and of an interrupted run of each method."""
    found = {}
    for method, (tiny, changes, checkpoint) in METHODS.items():
        for name in (f"{method}, finished", f"{method}, interrupted"):
            workdir = tmp_path_factory.mktemp("made")
            config = tiny(workdir, log__hf_export=True, **SHORT, **changes)
            if name.endswith("finished"):
                assert command(config) == 0
            else:
                interrupted(config, checkpoint)
            found[name] = config, workdir
    return found


def test_one_damaged_file_is_found_or_harmless(made, tmp_path, capsys):
    table = {act: collections.defaultdict(collections.Counter) for act in ("flipped", "cut, emptied or removed")}
    wrong, seen = [], []
    for name, (config, source) in made.items():
        expected = facts(made[f"{name.split(',')[0]}, finished"][1])
        kinds = files_by_kind(source)
        for act, damage, count in zip(table, (flip, shorten), COUNTS[name.split(", ")[1]], strict=True):
            rng = random.Random(f"{name} {act}")
            order = [kind for kind in KINDS if kind in kinds]
            rng.shuffle(order)
            for i in range(count):
                file = rng.choice(kinds[order[i % len(order)]])
                workdir = copied(source, tmp_path / "run")
                how = damage(workdir / file, rng)
                became = outcome(dataclasses.replace(config, workdir=str(workdir)), expected, capsys)
                table[act][kind_of(file)][became.found] += 1
                seen.append(f"{name}: {file}: {how}: {became.found}: {became.said}")
                if became.found in ("OTHER", "CRASH"):
                    wrong.append(seen[-1])
                with capsys.disabled():
                    print(seen[-1], flush=True)
    with capsys.disabled():
        for act, kinds in table.items():
            print(f"\n| {act} | {' | '.join(OUTCOMES)} |\n|{'---|' * (1 + len(OUTCOMES))}")
            for kind in (kind for kind in KINDS if kind in kinds):
                print(f"| {kind} | {' | '.join(str(kinds[kind][found]) for found in OUTCOMES)} |")
            total = sum(kinds.values(), collections.Counter())
            print(f"| all {total.total()} | {' | '.join(str(total[found]) for found in OUTCOMES)} |")
    assert not wrong, "\n".join(wrong)


def test_a_work_directory_that_nobody_touched_is_sound_and_verifying_it_writes_nothing(made, capsys):
    for config, workdir in made.values():
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in workdir.rglob("*")}
        assert command(config, "verify") == 0
        assert "all as it was written" in capsys.readouterr().out
        assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in workdir.rglob("*")}
