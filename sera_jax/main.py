"""`python -m sera_jax.main --config=configs/NAME.py [--config.group.field=value ...]`: one run, restartable at any
point.

Exit codes: 0 done; 2 the flags, the config, the data or the work directory are refused, a loss was not finite, or the
machine failed the run, as a full disk does (the message says why and the way out); 75 stopped by SIGTERM or SIGINT with
everything saved (the same command goes on from there).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from absl import app, flags
from ml_collections import config_flags

from sera_jax.config import last_overrides

EXIT_REFUSED = 2
EXIT_PREEMPTED = 75
MAX_WORDS = 800  # letters of what is wrong with a flag

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A file of configs/; override its fields with --config.a.b=value."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where a refusal was raised, not only its message.")
_OTHER_VERSIONS = flags.DEFINE_bool(
    "allow_other_versions",
    False,
    "Go on with a work directory of another numerics version or minor release of jax, flax or optax; it is recorded.",
)


class StopOnSignal:
    """Called, says whether SIGTERM or SIGINT came; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping at the next safe point ...", file=sys.stderr, flush=True)


def main(argv: list[str], *, stop_requested: Callable[[], bool] = lambda: False) -> None:
    """Run what the flags ask for; ends the process with the exit codes above where it is not done."""
    # Seconds of imports, so not before signals are heard.
    from sera_jax import experiment, memory
    from sera_jax.experiment.methods import parse
    from sera_jax.loops.runtime import Preempted

    memory.trim_after_compilations()
    logging.getLogger("jax").setLevel(logging.WARNING)  # or it tells which accelerators this machine has not
    try:
        if stop_requested():
            raise Preempted("stopped before anything was done; the same command starts it")
        config = parse(_CONFIG.value)
        with memory.named("the run", memory.WAY_OUT):
            experiment.run(config, stop_requested=stop_requested, allow_other_versions=_OTHER_VERSIONS.value)
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
        getattr(_CONFIG.value, "workdir", "")  # raises where the file could not be loaded
        _CONFIG.value.update_from_flattened_dict(dict.fromkeys(unset))
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
