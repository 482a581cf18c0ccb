"""`python -m sera_jax.main --config=configs/NAME.py [--config.group.field=value ...]`: one run, restartable at any
point.

Exit codes: 0 done; 2 the flags, the config, the data or the work directory are refused, or a loss was not finite (the
message says why and the way out);
75 stopped by SIGTERM or SIGINT with everything saved (the same command goes on from there).
"""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

from absl import app, flags
from ml_collections import config_flags

from sera_jax import experiment, memory
from sera_jax.config import check_field
from sera_jax.experiment.methods import parse
from sera_jax.loops.runtime import Preempted

EXIT_REFUSED = 2
EXIT_PREEMPTED = 75

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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is not understood; overrides look like --config.train.learning_rate=1e-6")
    memory.trim_after_compilations()
    logging.getLogger("jax").setLevel(logging.WARNING)  # or it tells which accelerators this machine has not
    try:
        experiment.run(parse(_CONFIG.value), stop_requested=StopOnSignal(), allow_other_versions=_OTHER_VERSIONS.value)
    except (ValueError, FileNotFoundError) as error:
        if _TRACEBACK.value:
            raise
        print(f"error: {error}\n(--traceback shows where)", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags; what is wrong with one is said in a line, without a traceback."""
    try:
        for argument in argv[1:]:
            if argument.startswith("--config."):
                check_field(argument.removeprefix("--config.").split("=")[0])
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error).strip()
        if "Traceback" in text:  # raised within a config file: its own words are the last line
            text = text.splitlines()[-1]
        print(f"error: {text}\n(configs/base.py has every field; --help lists the flags)", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
