"""The kill campaign: runs that are killed at random moments, also while they go on, end as one that was not.

The real command, real signals, both methods, on one and on two simulated devices. `pytest -m slow -k kills_test -s`
tells how each run ends; `.cache/kills.json` has every kill.
"""

import dataclasses
import json
import subprocess
import time

import pytest

from sera_jax.checkpoint.papers import read_json, write_json
from tests.loops import campaign, restart_test, srppo_restart_test
from tests.loops.kills import ROOT, assert_same_end, finish

KILLS = 25  # of each method on each number of devices
RUNS = {"SeRA": restart_test.start, "Self-Rewarding PPO": srppo_restart_test.start}
RECORD = ROOT / ".cache" / "kills.json"


@pytest.mark.parametrize("restartable", [True, False])
def test_the_campaign_tells_whether_kills_change_what_a_run_ends_in(restartable, tmp_path):
    script = 'echo done {} "$0"; sleep 0.5'.format(">" if restartable else ">>")

    def start(workdir):
        return subprocess.Popen(["sh", "-c", script, str(workdir)], stderr=subprocess.PIPE, text=True)

    def check(workdir):
        assert workdir.read_text() == "done\n"

    kills = campaign.campaign(start, check, tmp_path, 1.0, "toy 2656", 4)  # a seed with no signal in the first 0.2 s
    assert [kill.outcome == campaign.SAME for kill in kills] == [restartable] * 4
    assert campaign.row("toy", kills)[-1] == f"{4 * restartable} of 4"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("method", RUNS)
def test_runs_killed_at_random_moments_end_as_one_that_was_not(method, devices, tmp_path):
    def start(workdir):
        return RUNS[method](workdir, devices)

    whole, seconds = tmp_path / "whole", 0.0
    for workdir in (tmp_path / "compiling", whole):
        begun = time.monotonic()
        code, err = finish(start(workdir))
        seconds = time.monotonic() - begun
        assert code == 0, err
    assert_same_end(tmp_path / "compiling", whole)

    name = f"{method}, {devices} device{'s' * (devices > 1)}"
    kills = campaign.campaign(start, lambda torn: assert_same_end(torn, whole), tmp_path, seconds, name, KILLS)
    write_json(RECORD, read_json(RECORD) | {name: [dataclasses.asdict(kill) for kill in kills]})
    print(f"\n{campaign.table([campaign.row(name, kills)])}")
    assert {kill.outcome for kill in kills} == {campaign.SAME}, json.dumps([kill.outcome for kill in kills])
    assert {kill.signal for kill in kills} == {number.name for number in campaign.SIGNALS}
