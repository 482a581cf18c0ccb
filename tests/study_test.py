"""The command itself on a small study: what is missing is run, what fails is named, what is stopped goes on."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sera_jax import compare, study
from sera_jax.studies.rows import key_of, put_rows, read_rows, rows_of
from tests.studies.lab import Lab, summary_of

ALL = [f"label_noise_{n}_seed{s}" for n in (0.0, 0.25) for s in (0, 1, 2)]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setattr("sera_jax.studies.pool._LOOK_SECONDS", 0.01)
    return Lab(tmp_path)


def test_a_study_runs_everything_keeps_a_row_for_each_arm_and_says_the_differences(lab, capsys):
    assert study.main(lab.flags) == 0
    assert sorted(lab.started()) == sorted(ALL)
    rows = lab.rows()
    places = [(row["setting"], row["seed"], row["arm"]) for row in rows]
    assert places == [
        (f"label_noise={n}", seed, arm) for n in (0.0, 0.25) for seed in (0, 1, 2) for arm in ("sft", "daa", "sera")
    ], "in the order of the study, whatever ended first"
    assert rows[2]["metrics"] == {
        "gold_mean": 0.6,
        "by/0": 0.6,
        "by/0.5": 1,
        "round1/gold_mean": 0.6,
        "round2/gold_mean": 0.6,
    }
    assert rows[2]["seconds"] == 3.5
    shown = capsys.readouterr().out
    assert "0.650 ± 0.124 (3)   0.100 ± 0.000 (3)" in shown
    found = json.loads((lab.folder / "runs" / "comparison.json").read_text())
    best = found["entries"][0]
    assert (best["setting"], best["arm"]) == ("label_noise=0.0", "sera")
    assert (lab.folder / "runs" / "comparison.png").exists()


def test_runs_are_handed_to_a_launcher_with_its_own_flags(tmp_path, monkeypatch, capsys):
    lab = Lab(tmp_path, seeds=(0,), launcher="launch/local.sh --processes=2", processes=1)
    real = f"exec {sys.executable}"
    is_watch = f'[ "$2" != sera_jax.status ] || {real} "$@"'
    stand_in = f'shift 2\n{real} {tmp_path}/stand_in.py {lab.prepared} "$@"'
    (tmp_path / "python").write_text(f"#!/bin/bash\n{is_watch}\n{stand_in}")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    assert study.main(lab.flags) == 0
    assert sorted(lab.started()) == sorted([name for name in ALL if name.endswith("seed0")] * 2)
    assert len(lab.rows()) == 6
    assert len(list((tmp_path / "runs").glob("*/seed0/logs/process-1.log"))) == 2
    (lab.prepared / "label_noise_0.25_seed0.fails").write_text("a loss was not finite")
    (tmp_path / "rows.jsonl").unlink()
    assert study.main(lab.flags) == 1
    assert "failed: label_noise=0.25/seed0: error: a loss was not finite (exit code 2" in capsys.readouterr().err


@pytest.mark.slow
def test_the_smallest_study_of_the_repository_runs_from_its_command_to_its_table(tmp_path, capsys, monkeypatch):
    """Its runs are real ones, on one device."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    rows, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    flags = ["--config=studies/smallest.py", "--config.seeds=0", f"--config.workdir={runs}", f"--config.rows={rows}"]
    assert study.main(flags) == 0, capsys.readouterr().err
    whole = rows.read_text()
    found = {row["arm"]: row["metrics"] for row in read_rows(rows)}
    assert len(found) > 1
    for metrics in found.values():
        assert {"gold_mean", "gold_by_temperature/0", "gold_by_task/repeat", "heldout_accuracy"} <= set(metrics)
    assert "minus" in (runs / "comparison.md").read_text() and (runs / "comparison.png").exists()
    assert study.main(flags) == 0
    assert rows.read_text() == whole and "0 to do" in capsys.readouterr().err


def test_only_what_is_missing_is_run_again(lab, capsys):
    assert study.main(lab.flags) == 0
    lab.started()
    rows = lab.folder / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text("".join(line + "\n" for line in whole.splitlines() if '"seed": 1' not in line))
    assert study.main(lab.flags) == 0
    assert sorted(lab.started()) == [name for name in ALL if name.endswith("seed1")]
    assert rows.read_text() == whole
    assert study.main(lab.flags) == 0
    assert lab.started() == []


def test_a_run_of_which_an_arm_has_no_row_is_made_again(lab, capsys):
    assert study.main(lab.flags) == 0
    lab.started()
    rows = lab.folder / "rows.jsonl"
    whole = rows.read_text().splitlines(keepends=True)
    (torn,) = [
        i for i, row in enumerate(lab.rows()) if (row["arm"], row["seed"], row["setting"][-1]) == ("daa", 1, "5")
    ]
    rows.write_text("".join(whole[:torn] + whole[torn + 1 :]))
    assert study.main(lab.flags) == 0
    assert lab.started() == ["label_noise_0.25_seed1"]
    assert "runs of which an arm has no row are made anew: label_noise=0.25/seed1" in capsys.readouterr().err
    assert rows.read_text() == "".join(whole)


def test_rows_that_another_command_adds_meanwhile_stay(lab):
    assert study.main([*lab.flags, "--config.seeds=1"]) == 0
    rows = lab.folder / "rows.jsonl"
    others = rows.read_text()
    rows.unlink()

    def add_them_late() -> bool:  # first asked after the rows were read, before anything runs
        if not rows.exists():
            rows.write_text(others)
        return False

    assert study.main([*lab.flags, "--config.seeds=0"], stop_requested=add_them_late) == 0
    assert {row["seed"] for row in lab.rows()} == {0, 1}
    lab.started()
    assert study.main(lab.flags) == 0
    assert lab.started() and not [name for name in lab.started() if not name.endswith("seed2")]


def test_no_row_is_lost_between_writers_of_one_file(tmp_path):
    file, keys = tmp_path / "rows.jsonl", [("a", seed) for seed in range(40)]

    def row(setting, seed):
        rest = {"arm": "sft", "identity": "", "varied": {}, "versions": {}, "metrics": {}}
        return {"setting": setting, "seed": seed, **rest}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: put_rows(file, key, [row(*key)], keys), keys))
    assert [key_of(row) for row in read_rows(file)] == keys


def test_rows_of_runs_that_the_study_has_no_more_stay_and_are_not_compared(lab, capsys):
    assert study.main(lab.flags) == 0
    whole = lab.rows()
    assert study.main([*lab.flags, "--config.seeds=2"]) == 0
    assert len(lab.rows()) == len(whole)
    assert "(3)" not in capsys.readouterr().out.split("written")[-2]


def test_a_run_that_fails_is_named_with_its_line_and_the_others_go_on(lab, capsys):
    (lab.prepared / f"{ALL[1]}.fails").write_text("no pair is left")
    assert study.main(lab.flags) == 1
    assert sorted(lab.started()) == sorted(ALL)
    assert len(lab.rows()) == 15
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: label_noise=0.0/seed1: error: no pair is left (exit code 2; all of it: ")
    (lab.prepared / f"{ALL[1]}.fails").unlink()
    assert study.main(lab.flags) == 0
    assert lab.started() == [ALL[1]]


def test_a_run_that_ends_as_stopped_though_nobody_asked_is_named(lab, capsys):
    (lab.prepared / f"{ALL[1]}.leaves").touch()
    assert study.main(lab.flags) == 1
    words = "failed: label_noise=0.0/seed1: it was stopped, but not by this command (exit code 75; "
    assert capsys.readouterr().err.splitlines()[-1].startswith(words)


def test_a_metric_that_no_run_has_costs_no_run(lab, capsys):
    assert study.main([*lab.flags, "--config.metrics=goold_mean"]) == 1
    assert "no comparison yet: no run has the metric 'goold_mean'; they have by/*, by/0," in capsys.readouterr().err
    lab.started()
    for smaller, best in (("true", "sft"), ("false", "sera")):
        flags = ["--config.metrics=gold_mean,by/*", f"--config.smaller_is_better={smaller}"]
        assert study.main([*lab.flags, *flags]) == 0
        assert json.loads((lab.folder / "runs" / "comparison.json").read_text())["entries"][0]["arm"] == best
    assert lab.started() == []
    with pytest.raises(SystemExit, match="2"):
        study.main([*lab.flags, "--config.smaller_is_better=perhaps"])


def test_what_cannot_be_compared_yet_is_said_and_the_failure_stays_a_failure(lab, capsys):
    lab.write(baseline="label_noise=0.25")
    for name in ALL[3:]:
        (lab.prepared / f"{name}.fails").write_text("no pair is left")
    assert study.main(lab.flags) == 1
    assert "no comparison yet: baseline='label_noise=0.25' is nothing here" in capsys.readouterr().err


def test_a_run_that_ends_without_the_summary_of_its_config_has_failed(lab, capsys):
    other = summary_of(lab.runs()[0])
    other["config"]["train"]["learning_rate"] = 0.5
    (lab.prepared / f"{ALL[0]}.json").write_text(json.dumps(other))
    assert study.main(lab.flags) == 1
    assert "is not of the config and versions of label_noise=0.0/seed0" in capsys.readouterr().err
    assert len(lab.rows()) == 15


def test_a_study_that_is_stopped_stops_its_runs_and_the_same_command_goes_on(lab, capsys):
    waits = [lab.prepared / f"{name}.waits" for name in ALL[2:]]
    for path in waits:
        path.touch()
    running = [lab.prepared / f"{name}.waiting" for name in ALL[2:4]]
    assert study.main(lab.flags, stop_requested=lambda: all(path.exists() for path in running)) == 75
    assert sorted(lab.started()) == ALL[:4], "two were done, two were stopped, two were not begun"
    assert "stopped after 2 of 6 runs; the same command goes on" in capsys.readouterr().err
    for path in waits:
        path.unlink()
    assert study.main(lab.flags) == 0
    assert sorted(lab.started()) == ALL[2:]


def test_ctrl_c_stops_the_study_and_its_runs(lab):
    (lab.prepared / f"{ALL[0]}.waits").touch()
    command = [sys.executable, "-m", "sera_jax.study", *lab.flags, "--config.processes=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (lab.prepared / f"{ALL[0]}.waiting").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "label_noise=0.0/seed0: stopped, and saved" in err
    assert lab.started() == [ALL[0]]


def test_rows_of_another_config_are_said_and_made_anew_in_another_folder(lab, capsys):
    assert study.main(lab.flags) == 0
    folders = {path.name for path in (lab.folder / "runs").iterdir() if path.is_dir()}
    lab.started()
    lab.write(grid={"data.label_noise": (0.0, 0.25)}, settings={"": {"train.num_train_epochs": 2}}, seeds=(0,))
    assert study.main(lab.flags) == 0
    assert sorted(lab.started()) == ["label_noise_0.0_seed0", "label_noise_0.25_seed0"]
    words = "rows of another config or of other versions are made anew: label_noise=0.0/seed0, label_noise=0.25/seed0"
    assert words in capsys.readouterr().err
    assert {path.name for path in (lab.folder / "runs").iterdir() if path.is_dir()} > folders
    with pytest.raises(ValueError, match=r"rows of setting 'label_noise=0\.0' are of several configs"):
        rows_of([str(lab.folder / "rows.jsonl")])


def test_work_directories_and_the_rows_of_the_study_say_the_same(lab, capsys):
    assert study.main(lab.flags) == 0
    capsys.readouterr()
    folders = [str(path.parent) for path in sorted((lab.folder / "runs").glob("*/*/summary.json"))]
    assert compare.main([*folders, "--baseline=daa"]) == 0
    of_folders = capsys.readouterr().out
    assert compare.main([str(lab.folder / "rows.jsonl"), "--baseline=daa"]) == 0
    assert capsys.readouterr().out == of_folders
    assert "label_noise=0.25   daa" in of_folders
    assert "several versions" not in of_folders
    assert compare.main([*folders, folders[0]]) == 2
    assert "arm sft of setting 'label_noise=0.0' is there twice with seed 0" in capsys.readouterr().err


def test_runs_of_several_versions_are_compared_and_it_is_said(lab, capsys):
    for seed, numerics in enumerate("12"):
        summary = summary_of(lab.runs()[seed])
        summary["versions"]["numerics"] = numerics
        (lab.folder / numerics).mkdir()
        (lab.folder / numerics / "summary.json").write_text(json.dumps(summary))
    assert compare.main([str(lab.folder / "1"), str(lab.folder / "2"), f"--out={lab.folder}/out"]) == 0
    words = capsys.readouterr().out
    note = "runs of several versions, which may compute other numbers: numerics 1, jax"
    assert note in words
    assert note in (lab.folder / "out" / "comparison.md").read_text()
    assert note in json.loads((lab.folder / "out" / "comparison.json").read_text())["notes"][0]
    assert "(2)" in words


def test_files_and_folders_that_share_a_setting_are_of_one_config(lab, capsys):
    """Two files of one study's seeds are one comparison; of two configs under one name they are none."""
    assert study.main([*lab.flags, "--config.seeds=0,1"]) == 0
    one, two = lab.folder / "one.jsonl", lab.folder / "two.jsonl"
    for file, seed in ((one, 0), (two, 1)):
        file.write_text("".join(json.dumps(row) + "\n" for row in lab.rows() if row["seed"] == seed))
    folders = [str(path.parent) for path in (lab.folder / "runs").glob("*/seed0/summary.json")]
    assert len(rows_of([str(one), str(two)])) == len(rows_of([*folders, str(two)])) == 12
    two.write_text(two.read_text().replace('"identity": "', '"identity": "0'))
    assert len(rows_of([str(two)])) == 6
    with pytest.raises(
        ValueError, match=r"one.jsonl and .*two.jsonl: the rows of setting 'label_noise=0.0' are of sev"
    ):
        rows_of([str(one), str(two)])
    with pytest.raises(ValueError, match=r"two.jsonl and the work directories: the rows of setting 'label_noise="):
        rows_of([*folders, str(two)])


def test_runs_of_two_methods_are_compared_by_what_each_reads(lab):
    first, *_ = lab.runs()
    one, other = summary_of(first), summary_of(first)
    other["config"] |= {"method": "srppo"}
    other["config"]["ppo"] |= {"iterations": 7}
    other["config"]["sera"] |= {"rounds": 9}
    for name, summary in (("one", one), ("other", other)):
        (lab.folder / name).mkdir()
        (lab.folder / name / "summary.json").write_text(json.dumps(summary))
    rows = rows_of([str(lab.folder / "one"), str(lab.folder / "other")])
    assert {"method": "srppo", "ppo.iterations": 7}.items() <= rows[-1]["varied"].items()
    assert "sera.rounds" not in rows[-1]["varied"]
    assert "ppo.iterations" not in rows[0]["varied"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config=studies/absent.py"], "studies/absent.py: FileNotFoundError"),
        (["{lab}", "--config.threads=0"], "config.threads=0; it must be at least 1"),
        (["{lab}", "--config.seeds="], r"config.seeds=(); give one at least"),
        (["{lab}", "--config.metrics="], "metrics=(); name one at least"),
        (["{lab}", "--config.arms=daa,seera"], "no run has the arm 'seera'; they have sft, daa, sera"),
        (
            ["{lab}", "--config.baseline=dpo"],
            "baseline='dpo' is nothing here; choose of sft, daa, sera, label_noise=0.0,",
        ),
        (["{lab}", "--config.panels=loss.beta"], "panels='loss.beta' is no field of the setting 'label_noise=0.0'; "),
    ],
)
def test_a_refused_study_is_one_line(lab, capsys, flags, words):
    assert study.main([flag.replace("{lab}", lab.flags[0]) for flag in flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert lab.started() == []


def test_a_line_that_is_no_row_is_refused_with_its_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    for line in (
        "{",
        "[]",
        '{"setting": "a"}',
        '{"setting": 1, "seed": 0, "arm": "", "varied": {}, "identity": "", "versions": {}, "metrics": {}}',
    ):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=r"rows.jsonl:1 is no row of a study .*; remove that line"):
            read_rows(file)
