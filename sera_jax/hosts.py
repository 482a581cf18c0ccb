"""Several processes that run one job together: how they find each other, agree, and stop together.

All run the same program, plan the same batches from the same files, and compute on one mesh. The first one decides what
is decided once and writes what is written once; the others read it on the file system that they share. What they say
to each other goes through JAX's coordination service, not through the devices. With one process nothing here does
anything.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from sera_jax import stamps

HEARTBEAT_SECONDS = 10  # after this long without a sign of one process, the others end
SHUTDOWN_SECONDS = 20  # that a process which ends waits for the others
_LATER = 60  # seconds after `give_up`, lest jax come before
_FOREVER_MS = 30 * 24 * 3600 * 1000  # of a wait: where a process is gone, the heartbeat ends it before
_ALONE = "--num_processes=1 runs this process alone"

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which process this is, and of how many."""

    index: int = 0
    count: int = 1


_hosts = Hosts()
_turns = itertools.count()  # of what the processes say to each other, in the order that is the same in all


def count() -> int:
    """How many processes there are."""
    return _hosts.count


def index() -> int:
    """Which of them this process is."""
    return _hosts.index


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    return _hosts.index == 0


def connect(
    address: str | None,
    processes: int | None,
    index: int | None,
    timeout_seconds: int,
    give_up: Callable[[str], None],
) -> None:
    """Join the processes of the job, before any device is asked for; does nothing where there is only this one.

    Args:
        address: host:port of the first process, where it listens. processes: how many. index: which of them this is.
            All None: as the environment says (TPU, SLURM, Kubernetes, Open MPI), if it speaks of several.
        give_up: ends the process, with a message, where the others are not there in time; called by another thread.

    Raises:
        ValueError: they do not fit together, or the others cannot be joined.
    """
    import jax  # a process on its own may have no use for it
    from jax._src.distributed import global_state

    global _hosts
    if place(address, processes, index).count == 1:
        return
    where = f"process {index} of {processes} at {address}" if address else "the processes of this job"
    failed = (
        f"{where}: not all processes were there within {timeout_seconds} seconds (--connect_seconds); start all, with "
        f"the same address and count. {_ALONE}"
    )
    # JAX aborts the process where they do not find each other, with a stack of its own calls
    watch = threading.Timer(timeout_seconds, give_up, [failed])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            address,
            processes,
            index,
            initialization_timeout=timeout_seconds + _LATER,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:  # jax has no kind of its own for it
        raise ValueError(f"{where} cannot be joined ({' '.join(str(error).split())[:200]}). {_ALONE}") from error
    finally:
        watch.cancel()
    _hosts = Hosts(int(global_state.process_id), int(global_state.num_processes))


def place(address: str | None, processes: int | None, index: int | None) -> Hosts:
    """Which process this is to be, and of how many; the others are not asked. Arguments and errors as of `connect`."""
    given = {"--coordinator_address": address, "--num_processes": processes, "--process_id": index}
    if processes == 1:
        return Hosts()
    if all(value is None for value in given.values()):
        return _of_environment()
    if lacking := [name for name, value in given.items() if value is None]:
        raise ValueError(f"{', '.join(lacking)}: not given; give all of {', '.join(given)}, or none of them")
    if not 0 <= (index or 0) < (processes or 0):
        raise ValueError(f"--process_id={index}: of --num_processes={processes}, give 0 to {(processes or 0) - 1}")
    if ":" not in (address or ""):
        raise ValueError(f"--coordinator_address={address!r}: give host:port, where process 0 listens")
    return Hosts(index or 0, processes or 1)


def _of_environment() -> Hosts:
    """What the environment says, where it is one of those that jax knows and speaks of several processes."""
    from jax._src.clusters import ClusterEnv  # what `initialize` asks; there is no public way to ask first

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    try:
        found = next((kind for kind in kinds if kind.is_env_present()), None)
        count = 1 if found is None else found.get_process_count()
        return Hosts() if found is None or count == 1 else Hosts(found.get_process_id(), count)
    except RuntimeError as error:
        raise ValueError(f"the environment names no processes ({error}); {_ALONE}") from error


def on_first(act: Callable[[], Found]) -> Found:
    """What `act`, done by the first process alone, gives; every process gets it, or the error that it raises.

    All processes must come here, and to `barrier`, in the same order. What is given goes by pickle.
    """
    if count() == 1:
        return act()
    name = _turn()
    if is_first():
        try:
            outcome = act(), None
        except Exception as error:
            outcome = None, error
        _client().key_value_set_bytes(name, pickle.dumps(outcome))
    else:
        outcome = pickle.loads(_client().blocking_key_value_get_bytes(name, _FOREVER_MS))
    value, error = outcome
    if error is not None:
        raise error
    return value


def barrier() -> None:
    """Returns when all processes have come here."""
    if count() > 1:
        _client().wait_at_barrier(_turn(), _FOREVER_MS)


def stopping_together(asked: Callable[[], bool]) -> Callable[[], bool]:
    """Whether to stop: `asked`, of one process. Of several, the answer turns True at the same call in all of them once
    one has got SIGTERM or was asked; so all must ask equally often."""
    if count() == 1:
        return asked
    from jax.experimental import multihost_utils

    calls = itertools.count(1)
    told = stopped = False

    def stop() -> bool:
        nonlocal told, stopped
        if asked() and not told:
            os.kill(os.getpid(), signal.SIGTERM)  # which jax listens to from `connect` on
            told = True
        stamps.moved(turn=True)
        stopped = multihost_utils.reached_preemption_sync_point(next(calls)) or stopped
        return stopped

    return stop


def _turn() -> str:
    """A name that all processes give to what they do next."""
    stamps.moved(turn=True)
    return f"sera_jax/{next(_turns)}"


def _client() -> Any:
    from jax._src.distributed import global_state  # its key-value store and barrier are public nowhere

    return global_state.client
