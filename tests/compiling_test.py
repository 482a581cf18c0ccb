"""A compilation that takes long is said while it goes on, by the name of its program; others are not."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from sera_jax import compiling

EVENT = "/jax/core/compile/backend_compile_duration"


def compile_anew(length):
    """Long enough to compile that a thread gets its turn, where `length` is in the hundreds."""

    def step(x):
        for _ in range(length):
            x = jnp.sin(x @ x)
        return x

    jax.jit(step)(np.ones((3, 3), np.float32))


def test_a_compilation_is_said_by_the_name_of_its_program():
    lines = []
    with compiling.said(lines.append, after_seconds=0):
        compile_anew(300)
    assert "compiling an update for shapes that are new ..." in lines


def test_a_short_compilation_and_a_call_that_compiles_nothing_are_not_said():
    lines = []
    with compiling.said(lines.append, after_seconds=0.5):
        monitoring.record_scalar(EVENT, 0.0, fun_name="jit(step)")
        monitoring.record_event_duration_secs(EVENT, 0.01, fun_name="jit(step)")
        monitoring.record_scalar("/jax/another", 0.0, fun_name="jit(step)")
        threading.Event().wait(0.8)
        assert lines == []


def test_nothing_is_said_afterwards_nor_of_a_compilation_that_was_left():
    lines = []
    with compiling.said(lines.append, after_seconds=0.2):
        monitoring.record_scalar(EVENT, 0.0, fun_name="jit(step)")  # begins, and never ends
    monitoring.record_scalar(EVENT, 0.0, fun_name="jit(step)")
    threading.Event().wait(0.4)
    assert lines == []


def test_programs_of_one_name_in_a_row_are_said_once():
    lines, seen = [], threading.Semaphore(0)

    def say(text):
        lines.append(text)
        seen.release()

    with compiling.said(say, after_seconds=0.01, again_seconds=60):
        for name in ("jit(step)", "jit(step)", "jit(decode)"):
            monitoring.record_scalar(EVENT, 0.0, fun_name=name)
            threading.Event().wait(0.1)
            monitoring.record_event_duration_secs(EVENT, 0.1, fun_name=name)
        assert seen.acquire(timeout=20) and seen.acquire(timeout=20)
    assert [line.split()[1:3] for line in lines] == [["an", "update"], ["the", "decoder"]]


def test_programs_of_one_name_that_keep_coming_are_said_again_and_again():
    """A program every 0.1 s, each within `again_seconds` of the one before it."""
    lines = []
    with compiling.said(lines.append, after_seconds=0.01, again_seconds=0.3):
        for _ in range(10):
            monitoring.record_scalar(EVENT, 0.0, fun_name="jit(step)")
            threading.Event().wait(0.1)
            monitoring.record_event_duration_secs(EVENT, 0.1, fun_name="jit(step)")
    assert len(lines) > 1


@pytest.mark.parametrize(
    ("function", "words"), [("jit(step)", "an update"), ("score", "the scorer"), ("jit(f)", "f"), ("", "a program")]
)
def test_a_program_has_a_name(function, words):
    assert compiling.in_words(function) == words
