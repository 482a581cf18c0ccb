"""The launchers, run with an interpreter and schedulers that only record what they are asked for: what would run, with
which arguments, and which exit code comes back."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def script(path: pathlib.Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_(tmp_path):
    """A folder that comes first on PATH."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def start(name, bin_, *flags, **environment):
    own = {"PATH": f"{bin_}:{os.environ['PATH']}", "LOGS": str(bin_.parent / "logs"), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([LAUNCH / name, *flags], env=os.environ | own, start_new_session=True, **pipes)


def launched(name, bin_, *flags, **environment):
    """(exit code, standard output, standard error)."""
    process = start(name, bin_, *flags, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def wait_for(path):
    wait_until(path.exists)


def wait_until(there):
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@each_script
def test_launchers_hold_no_hyper_parameters(path):
    code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    fields = [word for line in code for word in line.split() if word.startswith("--config.")]
    assert all(field.startswith("--config.workdir=") for field in fields)


@each_script
def test_launchers_pass_shellcheck(path):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (requirements-test.txt has it)")
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_launcher_without_an_environment_says_what_to_do(bin_):
    code, _, err = launched("local.sh", bin_, PYTHON=str(bin_ / "absent"))
    assert code == 1 and "make env" in err


# sera_jax.main of a process: it says what it was given. sera_jax.status is the real one.
STAND_IN = f"""
if [ "$2" = sera_jax.status ]; then exec {sys.executable} "$@"; fi
index=${{@: -1}}; index=${{index#*=}}
for word; do case $word in --progress_dir=*) progress=${{word#*=}} ;; esac; done
trap 'exit 75' TERM
sign() {{ # when it last got anywhere, and after how many turns
  printf '{{"process": %d, "processes": 2, "host": "h", "pid": %d, "time": %s, "moved": %s, "turn": %d}}' \\
    "$index" $$ "$(date +%s.%N)" "$1" "$2" >"$progress/$index"
  mv "$progress/$index" "$progress/process-$index.json"
}}
"""


def local(bin_, body, *flags, gpus=4, **environment):
    """launch/local.sh with processes that do `body`, as process `$index`, on a machine of so many GPUs."""
    script(bin_ / "python", STAND_IN + body)
    script(bin_ / "nvidia-smi", f"seq {gpus}")
    return start("local.sh", bin_, *flags, PYTHON="python", PORT="1234", **environment)


def end_of(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def test_the_local_launcher_gives_each_process_its_number_its_gpus_and_a_log(bin_):
    code, _, err = end_of(local(bin_, 'echo "$@ on $JAX_LOCAL_DEVICE_IDS"; exit 75', "--processes=2", "--config=a b"))
    assert code == 75, err
    logs = bin_.parent / "logs"
    for index, devices in enumerate(("0,1", "2,3")):
        said = (logs / f"process-{index}.log").read_text()
        joined = f"--coordinator_address=localhost:1234 --num_processes=2 --process_id={index}"
        assert said == f"-m sera_jax.main --config=a b --progress_dir={logs}/progress {joined} on {devices}\n"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--processes=3", "does not divide the 4 GPUs"),
        ("--processes=0", "give how many"),
        ("--silent_seconds=1m", "give whole seconds"),
    ],
)
def test_the_local_launcher_refuses_what_cannot_be(bin_, flag, words):
    code, _, err = end_of(local(bin_, "exit 0", flag))
    assert code == 2 and words in err


def test_the_local_launcher_names_the_silent_process_and_ends_the_others(bin_):
    """Process 1 is stuck after 5 turns, and the other waits for it in the sixth."""
    body = "moved=$(date +%s.%N); while :; do sign $moved $((6 - index)); sleep 0.2; done"
    code, _, err = end_of(local(bin_, body, "--processes=2", "--silent_seconds=2"))
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("process ")]
    assert line.startswith("process 1 of 2 (h, pid ") and "is alive but got nowhere for" in line
    assert "the same command goes on" in err


def test_the_local_launcher_lets_those_that_get_on_be(bin_):
    body = "for turn in $(seq 20); do sign $(date +%s.%N) $turn; sleep 0.2; done"
    code, _, err = end_of(local(bin_, body, "--processes=2", "--silent_seconds=2"))
    assert code == 0, err


def test_a_signal_stops_all_and_the_launcher_ends_as_they_do(bin_):
    process = local(bin_, 'touch "$progress/there-$index"; while :; do sleep 0.1; done', "--processes=2")
    there = bin_.parent / "logs" / "progress"
    for index in range(2):
        wait_for(there / f"there-{index}")
    process.send_signal(signal.SIGTERM)  # to the launcher alone
    assert end_of(process)[0] == 75


def test_the_exit_code_is_that_of_the_first_process_that_has_one(bin_):
    assert end_of(local(bin_, "exit $((index * 2))", "--processes=4"))[0] == 2


# What a shell, YAML, JSON, Kubernetes (`$(name)`, `$$`) or printf might take for something of their own.
NASTY = [
    "--config=configs/a b.py",
    '--config.data.train="a b;$(c)".jsonl',
    "--config.data.eval=it's `d` $HOME $$(e) $(PATH) &&\\n %s * ? \\",
    "--config.workdir=two\nlines\tand\ré",
    "--config.log.note=",
]
RECORD = 'printf "%s\\0" "$@" >"{folder}/{name}-$$"; '


def asked(folder, name):
    """The arguments of every call of a recorded program, in their order."""
    calls = sorted(folder.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime_ns)
    return [path.read_bytes().decode().split("\0")[:-1] for path in calls]


def recorded(bin_, name, body=""):
    script(bin_ / name, RECORD.format(folder=bin_.parent, name=name) + body)


SBATCH = """
while [[ $1 == --* ]]; do shift; done
echo '77;cluster'
SLURM_JOB_ID=77 SLURM_CPUS_PER_TASK=12 exec bash "$@"
"""
SRUN = """
while [[ $1 == --* ]]; do [[ $1 != --output=* ]] || output=${1#*=}; shift; done
SLURM_PROCID=0 "$@" >"${output//%t/0}" 2>&1
"""


@pytest.mark.parametrize("code", [0, 2, 75])
def test_slurm_runs_a_process_for_each_gpu_and_queues_again_what_was_saved(bin_, code):
    recorded(bin_, "sbatch", SBATCH)
    recorded(bin_, "srun", SRUN)
    recorded(bin_, "scontrol")
    recorded(bin_, "python", f"echo error: words on $SRUN_CPUS_PER_TASK cores; exit {code}")
    options = ["--nodes=2", "--gpus-per-node=a100:8", "--comment=a b"]
    ended, _, err = launched("slurm.sh", bin_, *options, *NASTY, PYTHON=str(bin_ / "python"))
    assert ended == code, err
    assert f"job 77 ended with {code}" in err and "error: words on 12 cores" in err
    (given,) = asked(bin_.parent, "sbatch")
    before = given[: given.index("launch/slurm.sh")]
    assert before[-3:] == options
    assert {"--wait", "--requeue", "--ntasks-per-node=8", "--open-mode=append"} <= set(before)
    assert any(word.startswith("--signal=TERM@") for word in before)
    assert asked(bin_.parent, "python") == [["-m", "sera_jax.main", *NASTY]]
    assert asked(bin_.parent, "scontrol") == ([["requeue", "77"]] if code == 75 else [])


def test_a_signal_has_the_job_of_slurm_saved_and_not_queued_again(bin_):
    recorded(bin_, "sbatch", f"echo 77; touch {bin_}/there; until [ -e {bin_}/stopped ]; do sleep 0.1; done; exit 75")
    recorded(bin_, "scancel", f"touch {bin_}/stopped")
    recorded(bin_, "scontrol")
    process = start("slurm.sh", bin_, "--gpus-per-node=1", "--config=a")
    wait_for(bin_ / "there")
    os.killpg(process.pid, signal.SIGTERM)  # as a study does, and Ctrl-C
    assert end_of(process)[0] == 75
    assert asked(bin_.parent, "scontrol") == [["update", "JobId=77", "Requeue=0"]]
    assert asked(bin_.parent, "scancel")[-1] == ["--state=RUNNING", "--signal=TERM", "77"]


# What gcloud does with a command: a worker is a folder, in which a shell runs it.
GCLOUD = """
case "$4" in
  describe) printf '3\\t1\\n'; exit ;;
  ssh) for word; do case $word in --worker=*) worker=${word#*=} ;; --command=*) command=${word#*=} ;; esac; done
    cd "$WORKERS/$worker" && exec bash -c "$command" ;;
  scp) for word; do case $word in --worker=*) worker=${word#*=} ;; esac; done
    exec cp "$5" "$WORKERS/$worker/${6#*:}" ;;
esac
"""


@pytest.fixture
def slice_(bin_):
    """Of three workers, to each of which launch/ has been copied; (the folders, what the launcher is called with)."""
    workers = bin_.parent / "workers"
    for index in range(3):
        (workers / f"{index}" / "a folder").mkdir(parents=True)
        shutil.copytree(LAUNCH, workers / f"{index}" / "a folder" / "launch")
    recorded(bin_, "gcloud", GCLOUD)
    return workers, ["my-slice", "--zone=z", "--internal-ip", "--directory=a folder", f"--python={bin_}/python"]


@pytest.mark.parametrize("code", [0, 2, 75])
def test_every_worker_of_a_slice_runs_the_command_and_has_a_log(bin_, slice_, code):
    workers, options = slice_
    recorded(bin_, "python", f'echo "error: words of $(basename "$(dirname "$PWD")")"; exit {code}')
    ended, _, err = launched("tpu_vm.sh", bin_, *options, *NASTY, WORKERS=str(workers))
    assert ended == code, err
    assert asked(bin_.parent, "python") == [["-m", "sera_jax.main", *NASTY]] * 3
    described, *calls = asked(bin_.parent, "gcloud")
    assert described[:5] == ["compute", "tpus", "tpu-vm", "describe", "my-slice"] and "--internal-ip" not in described
    assert {call[-3] for call in calls} == {"--worker=0", "--worker=1", "--worker=2"}
    assert all(call[3:5] == ["ssh", "my-slice"] and call[-2:] == ["--zone=z", "--internal-ip"] for call in calls)
    for index in range(3):
        assert f"words of {index}" in (bin_.parent / "logs" / f"worker-{index}.log").read_text()
    assert "words of 0" in err


def test_a_slice_whose_connection_was_lost_is_followed_by_the_same_command_and_by_no_other(bin_, slice_):
    workers, options = slice_
    waiting = f"for i in $(seq 300); do [ ! -e {bin_}/go ] || exit 0; sleep 0.1; done"
    recorded(bin_, "python", f"echo begun; touch {bin_}/there; {waiting}")
    lost = start("tpu_vm.sh", bin_, *options, "--config=a", WORKERS=str(workers))
    for index in range(3):
        wait_for(workers / f"{index}" / "a folder" / ".launch" / "pid")
    lost.kill()
    lost.communicate()
    code, _, err = launched("tpu_vm.sh", bin_, *options, "--config=b", WORKERS=str(workers))
    assert code == 2 and "another command is at work" in err
    logs = bin_.parent / "logs of the second"  # in those of the first it stands already
    again = start("tpu_vm.sh", bin_, *options, "--config=a", WORKERS=str(workers), LOGS=str(logs))
    for index in range(3):
        log = logs / f"worker-{index}.log"
        wait_until(lambda log=log: log.exists() and log.read_text() == "begun\n")
    (bin_ / "go").touch()
    assert end_of(again)[0] == 0
    assert len(asked(bin_.parent, "python")) == 3, "nothing was started twice"


def test_a_signal_stops_every_worker_of_a_slice(bin_, slice_):
    workers, options = slice_
    recorded(bin_, "python", "trap 'exit 75' TERM; while :; do sleep 0.1; done")
    process = start("tpu_vm.sh", bin_, *options, "--config=a", WORKERS=str(workers))
    for index in range(3):
        wait_for(workers / f"{index}" / "a folder" / ".launch" / "pid")
    time.sleep(0.5)  # till the traps are there
    os.killpg(process.pid, signal.SIGTERM)  # as a study does, and Ctrl-C
    assert end_of(process)[0] == 75


def test_this_checkout_is_copied_to_every_worker(bin_, slice_):
    workers, options = slice_
    recorded(bin_, "python")
    options = [option.replace("a folder", "another one") for option in options]
    code, _, err = launched("tpu_vm.sh", bin_, *options, "--copy", "--config=a", WORKERS=str(workers))
    assert code == 0, err
    for index in range(3):
        assert (workers / f"{index}" / "another one" / "sera_jax" / "main.py").exists()
        assert not (workers / f"{index}" / "another one" / ".git").exists()


def test_a_job_set_may_have_several_slices(bin_):
    code, _, err = end_of(on_gke(bin_, "first", "--slices=2", *GKE[1:], *NASTY))
    assert code == 0, err
    (jobs,) = yaml.safe_load((bin_ / "manifest").read_text())["spec"]["replicatedJobs"]
    assert jobs["replicas"] == 2 and jobs["template"]["spec"]["completions"] == 4, "hosts of a slice"


# A cluster whose job set ends at the second look as $ENDS says, with these exit codes of its pods.
KUBECTL = """
case "$*" in
  *create*) cat >"$STATE/manifest" ;;
  *delete*) rm -f "$STATE/manifest"* ;;
  *'get jobset'*name*) [ ! -e "$STATE/manifest" ] || echo jobset/first ;;
  *'get jobset'*) [ -e "$STATE/manifest" ] || exit 0
    echo 1 >>"$STATE/manifest-looks"
    echo "StartupPolicyCompleted $([ "$(wc -l <"$STATE/manifest-looks")" -lt 2 ] || echo "$ENDS")" ;;
  *exitCode*) echo "$CODES" ;;
  *'get pods'*) echo "first-slice-0-0 first-slice-0-1" ;;
  logs*) echo "log of $2" ;;
esac
"""
GKE = ["first", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--chips=4", "--image=r/i:t"]
GKE += ["--claim=bucket"]


def on_gke(bin_, *flags, ends="Completed", codes="0 0"):
    recorded(bin_, "kubectl", KUBECTL)
    environment = {"STATE": str(bin_), "ENDS": ends, "CODES": codes, "POLL_SECONDS": "0.05"}
    return start("gke_jobset.sh", bin_, *flags, **environment)


def test_a_job_set_is_one_that_jax_and_the_exit_codes_need(bin_):
    code, _, err = end_of(on_gke(bin_, *GKE, *NASTY))
    assert code == 0, err
    made = yaml.safe_load((bin_ / "manifest").read_text())
    spec = made["spec"]
    (jobs,) = spec["replicatedJobs"]
    assert jobs["replicas"] == 1
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # Kubernetes makes $ of $$, and of $(NAME) the variable
    assert [word.replace("$$", "\0") for word in container["args"] if "$(" in word.replace("$$", "\0")] == []
    assert [word.replace("$$", "$") for word in container["args"]] == NASTY
    assert made["metadata"]["name"] == "first" and container["image"] == "r/i:t"
    assert job["completions"] == job["parallelism"] == 4 and job["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    # 2 fails the job set; whatever else fails a pod starts all again
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert spec["failurePolicy"] == {
        "maxRestarts": 20,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert (bin_.parent / "logs" / "first-slice-0-1.log").read_text() == "log of first-slice-0-1\n"


@pytest.mark.parametrize(("codes", "code"), [("137 2", 2), ("0 75", 75), ("134 75", 134), ("", 1)])
def test_the_exit_code_of_a_job_set_is_that_of_its_pods(bin_, codes, code):
    ended, _, err = end_of(on_gke(bin_, *GKE, "--config=a", ends="Failed", codes=codes))
    assert ended == code and f"exit codes of its pods: {codes or 'unknown'}" in err


def test_a_job_set_that_is_at_work_is_followed_and_one_that_ended_is_made_anew(bin_):
    (bin_ / "manifest").write_text("as it was started")
    code, _, err = end_of(on_gke(bin_, *GKE, "--config=a"))
    assert code == 0 and "is at work already" in err
    assert (bin_ / "manifest").read_text() == "as it was started"
    code, _, err = end_of(on_gke(bin_, *GKE, "--config=a"))
    assert code == 0 and "is at work already" not in err
    assert "--config=a" in (bin_ / "manifest").read_text()


def test_a_signal_deletes_the_job_set_so_that_its_pods_save(bin_):
    process = on_gke(bin_, *GKE, "--config=a", ends="")
    wait_for(bin_ / "manifest-looks")
    os.killpg(process.pid, signal.SIGTERM)  # as a study does, and Ctrl-C
    assert end_of(process)[0] == 75 and not (bin_ / "manifest").exists()


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("slurm.sh", ["--gpus-per-node=8"], "give --config=FILE"),
        ("slurm.sh", ["--gres=gpu:8", "--config=a"], "give --gpus-per-node=N"),
        ("tpu_vm.sh", ["--zone=z", "--config=a"], "the slice's name first"),
        ("tpu_vm.sh", ["my-slice", "--config=a"], "give --zone=ZONE"),
        ("gke_jobset.sh", ["A name", "--config=a"], "the job set's name first"),
        ("gke_jobset.sh", [*GKE[:-1], "--config=a"], "give --claim="),
        ("gke_jobset.sh", [*GKE, "--claim=a: b", "--config=a"], "letters, digits"),
        ("gke_jobset.sh", [*GKE, "--zone=z", "--config=a"], "--zone=z is not understood"),
    ],
)
def test_a_launcher_refuses_what_lacks_before_it_asks_for_anything(bin_, name, flags, words):
    for program in ("sbatch", "gcloud", "kubectl"):
        recorded(bin_, program)
    code, _, err = launched(name, bin_, *flags)
    assert code == 2 and words in err
    assert not [call for program in ("sbatch", "gcloud", "kubectl") for call in asked(bin_.parent, program)]
