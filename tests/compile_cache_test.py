"""What one process compiled the next one takes from the user's cache folder, unless the environment says otherwise."""

import os
import time

import jax
import numpy as np
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from sera_jax import compile_cache, evaluate, generate, processor
from tests.main_test import refused, start

DAY = 24 * 3600
SETTINGS = {  # JAX's own defaults
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A user's cache folder, in an environment that says nothing of compiled programs."""
    for variable in (compile_cache.FOLDER, compile_cache.SECONDS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def hits():
    """Programs that were taken from the folder."""
    found = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    monitoring.register_event_listener(listen)
    yield found
    monitoring.unregister_event_listener(listen)


def computed():
    """By a program that nothing else compiles, which is compiled anew."""
    jax.clear_caches()
    return jax.jit(lambda x: 3 * x - 7654321)(np.arange(5.0, dtype=np.float32))


def test_the_next_start_takes_what_this_one_compiled(home, hits):
    compile_cache.use()
    first = computed()
    assert not hits and list(compile_cache.folder().glob("jit*")) and compile_cache.folder().is_relative_to(home)
    np.testing.assert_array_equal(computed(), first)
    assert len(hits) == 1


def test_a_program_that_was_half_written_is_compiled_again(home, hits):
    compile_cache.use()
    first = computed()
    for program in compile_cache.folder().glob("*-cache"):
        program.write_bytes(program.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        np.testing.assert_array_equal(computed(), first)
    assert not hits


@pytest.mark.parametrize("named", ["/elsewhere", ""])
def test_what_the_environment_says_holds(home, monkeypatch, named):
    monkeypatch.setenv(compile_cache.FOLDER, named)
    jax.config.update("jax_compilation_cache_dir", named)  # as JAX reads it when it is imported
    compile_cache.use()
    assert jax.config.jax_compilation_cache_dir == (named or None)
    assert not list(home.iterdir())


def test_one_of_several_processes_keeps_nothing(home):
    compile_cache.use(processes=2)
    assert jax.config.jax_compilation_cache_dir is None and not list(home.iterdir())


def test_a_time_that_the_environment_says_is_kept(home, monkeypatch):
    monkeypatch.setenv(compile_cache.SECONDS, "5")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    compile_cache.use()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 5.0


def test_old_programs_are_deleted_and_young_ones_stay_and_what_is_no_program(home):
    place = compile_cache.folder()
    (place / "of_xla").mkdir(parents=True)
    for name, days in (("jit_old-cache", compile_cache.DAYS + 1), ("jit_young-cache", compile_cache.DAYS - 1)):
        (place / name).touch()
        os.utime(place / name, (time.time() - days * DAY,) * 2)
    os.utime(place / "of_xla", (time.time() - 1000 * DAY,) * 2)
    compile_cache.use()
    assert {path.name for path in place.iterdir()} == {"jit_young-cache", "of_xla"}


@pytest.mark.parametrize(("asked", "other"), [("instructions", "another"), ("cores", 1_000)])
def test_what_is_compiled_for_another_processor_or_number_of_cores_lies_apart(home, monkeypatch, asked, other):
    here = compile_cache.folder()
    monkeypatch.setattr(processor, asked, lambda: other)
    assert compile_cache.folder() != here


def test_a_folder_that_cannot_be_written_is_said_with_the_way_out(home, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    compile_cache.use()
    said = capsys.readouterr().err
    assert f"{compile_cache.folder()} cannot be written" in said and compile_cache.FOLDER in said
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(("command", "flag"), [(generate, "prompts"), (evaluate, "reference")])
def test_commands_that_compile_use_it(monkeypatch, command, flag):
    asked = []
    monkeypatch.setattr(compile_cache, "use", lambda: asked.append(command))
    assert command.main(["--checkpoint=nowhere", f"--{flag}=nowhere", "--out=nowhere"]) == 2
    assert asked == [command]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_run_uses_it_and_goes_on_where_there_is_no_such_folder(home, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").symlink_to("/dev/full")
    process = start("--config=configs/quickstart.py", f"--config.workdir={tmp_path / 'run'}")
    said = process.stderr.readline()
    assert said.startswith("compiled programs are not kept for the next start") and str(tmp_path / "file") in said
    assert "the disk is full" in refused(process)
