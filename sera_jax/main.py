"""`python -m sera_jax.main --config=configs/NAME.py [--config.group.field=value ...]`: one run, restartable at any
point.

Exit codes: 0 done (with --verify: all is as it was written); 2 the flags, the config, the data or the work directory
are refused, a loss was not finite, or the machine failed the run, as a full disk or too little memory does (the message
says why and the way out); 75 stopped by SIGTERM or SIGINT (the message says where the same command goes on).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from sera_jax.config import Config, last_overrides
from sera_jax.stop import EXIT_PREEMPTED, EXIT_REFUSED, StopOnSignal

MAX_WORDS = 800  # letters of what is wrong with a flag

CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A file of configs/; override its fields with --config.a.b=value."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where a refusal was raised, not only its message.")
_OTHER_VERSIONS = flags.DEFINE_bool(
    "allow_other_versions",
    False,
    "Go on with a work directory of another numerics version or minor release of jax, flax or optax; it is recorded.",
)
_SHARED_PHASES = flags.DEFINE_string(
    "shared_phases",
    "",
    "A folder of phases up to the SFT model: what lies there is taken instead of made, what is made is left there.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port where process 0 listens; with --num_processes and --process_id, which say how many run this command on "
    "the same --config.workdir and which this one is. Without them: as TPU, SLURM, Kubernetes or Open MPI say.",
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes run this together; 1: this alone.", 1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of the processes this is, from 0.", 0)
_CONNECT_SECONDS = flags.DEFINE_integer("connect_seconds", 300, "How long the processes wait for each other.", 1)
_PROGRESS_DIR = flags.DEFINE_string(
    "progress_dir",
    "",
    "Of several processes: the folder where each keeps its sign of life; default: progress/ in the work directory.",
)

_DRY_RUN = flags.DEFINE_flag(
    flags.EnumFlag(
        "dry_run",
        "false",
        "Do nothing: read all rows, and show what became of them, the first ones token by token, how long they are, "
        "what of held-out prompts stands in them, and how many updates there are; json: as one JSON object.",
        ["true", "json", "false"],
        boolean=True,  # it needs no value
    )
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Run nothing: read all that the work directory holds, and say what is no longer as it was written.",
)


def main(argv: list[str], *, stop_requested: Callable[[], bool] = lambda: False) -> None:
    """Run what the flags ask for; ends the process with the exit codes above where it is not done."""
    # Seconds of imports, so not before signals are heard.
    from sera_jax import compile_cache, experiment, hosts, memory
    from sera_jax.experiment.methods import parse
    from sera_jax.loops.runtime import Preempted

    memory.trim_after_compilations()
    logging.getLogger("jax").setLevel(logging.WARNING)  # or it tells which accelerators this machine has not
    try:
        if stop_requested():
            raise Preempted("stopped before anything was done; the same command starts it")
        config = parse(CONFIG.value)
        if _VERIFY.value and _DRY_RUN.value != "false":
            raise ValueError("--verify and --dry_run both run nothing; give one of them")
        if _VERIFY.value:
            for flag in (_SHARED_PHASES, _OTHER_VERSIONS):
                if flag.value:
                    print(f"--{flag.name} says nothing to --verify, which runs nothing", file=sys.stderr)
            with memory.named("--verify", "it holds a gigabyte of arrays, or the largest one: free that much here"):
                verify(config, stop_requested)
            return
        if _DRY_RUN.value != "false":
            with memory.named("--dry_run", "it holds the rows as a run does: free memory, or name fewer rows"):
                dry_run(config, stop_requested)
            return
        hosts.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _CONNECT_SECONDS.value, give_up)
        compile_cache.use(processes=hosts.count())
        with memory.named("the run", memory.WAY_OUT):
            experiment.run(
                config,
                stop_requested=hosts.stopping_together(stop_requested),
                allow_other_versions=_OTHER_VERSIONS.value,
                shared_phases=_SHARED_PHASES.value,
                progress_dir=_PROGRESS_DIR.value,
            )
    except (ValueError, OSError) as error:
        if _TRACEBACK.value:
            raise
        print(f"error: {in_words(error)}\n(--traceback shows where)", file=sys.stderr)
        if disk_is_full(error):  # without the libraries' exit handlers and threads, each with a traceback of it
            sys.stderr.flush()
            os._exit(EXIT_REFUSED)
        sys.exit(EXIT_REFUSED)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)


def give_up(message: str) -> None:
    """Refuse from whichever thread, while the main one waits in a library."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_REFUSED)


def verify(config: Config, stop_requested: Callable[[], bool]) -> None:
    """Say in a line what is damaged in the work directory; ends the process with 2 where anything is."""
    from sera_jax.experiment import verifying

    found = 0
    for line in verifying.damages(config, stop_requested):
        found += 1
        print(line, flush=True)
    if found:
        print(f"error: {found} of what {config.workdir} holds {'is' if found == 1 else 'are'} damaged", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    print(f"{config.workdir}: all as it was written, {verifying.counted(config)}")


def dry_run(config: Config, stop_requested: Callable[[], bool]) -> None:
    """Print what a run would read and train on, as the flag says. Of several processes the first one does."""
    import jax

    from sera_jax import hosts
    from sera_jax.experiment import dry_run, dry_run_report

    place = hosts.place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if place.index:
        print(f"process {place.index} of {place.count}: the first one does the dry run", file=sys.stderr)
        return
    jax.config.update("jax_platforms", "cpu")  # another process may be at work on the devices
    with contextlib.redirect_stdout(sys.stderr):
        facts = dry_run.look(
            config,
            stop_requested=stop_requested,
            allow_other_versions=_OTHER_VERSIONS.value,
            say=lambda text: print(text, file=sys.stderr),
        )
    print(json.dumps(facts, allow_nan=False) if _DRY_RUN.value == "json" else dry_run_report.as_text(facts))


def disk_is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def in_words(error: ValueError | OSError) -> str:
    """What a refusal says; of the machine's own errors, the way out of a full disk."""
    if isinstance(error, OSError) and disk_is_full(error):
        place = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{place}; make room and start the same command again: it goes on from there"
    return str(error)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags; what is wrong with one is said in a line, without a traceback."""
    try:
        arguments, unset = last_overrides(argv)
        rest = flags.FLAGS(arguments)
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r} is not understood; overrides look like --config.train.learning_rate=1e-6")
        getattr(CONFIG.value, "workdir", "")  # raises where the file could not be loaded
        CONFIG.value.update_from_flattened_dict(dict.fromkeys(unset))
        return rest
    except Exception as error:  # a config file is a program, and may raise anything
        print(
            f"error: {_of_config_file(error)}\n(configs/base.py has every field; --help lists the flags)",
            file=sys.stderr,
        )
        sys.exit(EXIT_REFUSED)


def _of_config_file(error: Exception) -> str:
    """One line: where in the config file it was raised, if there, and its own words."""
    words = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()  # a traceback as text ends in them
    if len(words) > MAX_WORDS:  # of which a value may be most
        words = f"{words[: MAX_WORDS // 2]} ... {words[-MAX_WORDS // 2 :]}"
    given = [argument.split("=", 1)[1] for argument in sys.argv if argument.startswith("--config=")]
    if isinstance(error, SyntaxError):
        return f"{error.filename or (given or ['--config'])[-1]}:{error.lineno or 1}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in given]
    if frames:
        return f"{frames[-1].filename}:{frames[-1].lineno}: {type(error).__name__}: {words}"
    if given and isinstance(error, LookupError):  # of an override, in what get_config returned
        return f"{given[-1]}: get_config() gives no config that has every field ({words})"
    return words


if __name__ == "__main__":
    stop = StopOnSignal()
    flags.mark_flag_as_required("config")
    app.run(functools.partial(main, stop_requested=stop), flags_parser=parse_flags)
