"""`python forked.py`: command lines on standard input, as JSON; for each what a process of its own answered.

A process starts the module as `python -m` does, but is forked off one that has imported it: seconds become tenths. One
that is not done when its policy is about to be made, or in a minute, counts as accepted.
"""

import json
import os
import runpy
import signal
import sys
import tempfile


def answer(module: str, argv: list[str]) -> tuple[int, str]:
    """(exit code, standard error) of the module with these arguments; a signal is a negative code."""
    with tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            signal.alarm(60)
            sys.argv = [module, *argv]
            try:
                runpy.run_module(module, run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err.seek(0)
        return code, err.read().decode(errors="replace")


def accepted(*args, **kwargs):
    raise AssertionError("accepted")


if __name__ == "__main__":
    from sera_jax import evaluate, experiment, export, generate  # noqa: F401

    experiment.starting_policy = accepted
    module, lines = json.load(sys.stdin)
    json.dump([answer(module, argv) for argv in lines], sys.stdout)
