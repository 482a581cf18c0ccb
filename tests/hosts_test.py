"""One process among several, without the others: what is refused, and that a lone process needs nobody."""

import pytest

from sera_jax import hosts
from sera_jax.checkpoint.papers import write_json


def connect(*given):
    hosts.connect(*given, timeout_seconds=1, give_up=print)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:1", 2, None), "--process_id: not given; give all of"),
        (("localhost:1", 2, 2), "--process_id=2: of --num_processes=2, give 0 to 1"),
        (("localhost", 2, 0), "--coordinator_address='localhost': give host:port"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_flag(given, words):
    with pytest.raises(ValueError, match=words):
        connect(*given)


@pytest.mark.parametrize("given", [(None, None, None), (None, 1, None), ("localhost:1", 1, 0)])
def test_a_lone_process_connects_to_nothing_decides_and_asks_its_own_signals(given):
    connect(*given)
    assert (hosts.count(), hosts.is_first()) == (1, True)
    asked = [False, True]
    assert [hosts.stopping_together(lambda: asked.pop(0))() for _ in range(2)] == [False, True]
    with pytest.raises(ValueError, match="of the first"):
        hosts.on_first(lambda: (_ for _ in ()).throw(ValueError("of the first")))
    hosts.barrier()


def test_an_environment_of_several_processes_is_noticed(monkeypatch):
    of_slurm = {"JOB_ID": "7", "STEP_NODELIST": "a,b", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in of_slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert hosts.place(None, None, None) == hosts.Hosts(1, 2)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.place(None, None, None) == hosts.Hosts()


def test_a_process_that_is_not_the_first_writes_no_files(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "_hosts", hosts.Hosts(1, 2))
    write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []
