"""Whole runs on several simulated devices, and runs stopped on one that go on there, end as one on a single device.

The real command in a process of its own; `sera_test` and `srppo_test` have a short version within their process.
"""

import signal

import pytest

from tests.loops import restart_test, srppo_restart_test
from tests.loops.alike import assert_alike
from tests.loops.kills import finish, signal_when

RUNS = {
    "SeRA": (restart_test.start, "sera/round2/1"),
    "Self-Rewarding PPO": (srppo_restart_test.start, "srppo/iteration3/1"),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """(how to start it, a checkpoint amid its training, the work directory of the whole run on one device)."""
    start, amid = RUNS[request.param]
    whole = tmp_path_factory.mktemp("whole")
    code, err = finish(start(whole))
    assert code == 0, err
    return start, amid, whole


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_a_whole_run_on_several_devices_ends_as_on_one(run, tmp_path, devices):
    start, _, whole = run
    code, err = finish(start(tmp_path, devices))
    assert code == 0, err
    assert_alike(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_a_run_stopped_on_one_device_goes_on_with_several_and_ends_alike(run, tmp_path, devices):
    start, amid, whole = run
    process = start(tmp_path)
    assert signal_when(process, (tmp_path / "checkpoints" / amid).exists, signal.SIGTERM)
    code, err = finish(process)
    assert code == 75, err
    code, err = finish(start(tmp_path, devices))
    assert code == 0, err
    assert_alike(tmp_path, whole)
