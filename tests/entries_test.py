"""The entries that do not train, run as a user runs them but in this process, on a policy of random weights."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from sera_jax import config as config_lib
from sera_jax import evaluate, export, generate, world
from sera_jax.checkpoint import Workdir
from sera_jax.checkpoint.papers import file_digest
from sera_jax.config import Config, DataGroup, LossGroup, SamplingGroup, WorldGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.bpe import train_bpe
from sera_jax.data.columns import Reading
from sera_jax.data.loading import Limits, load_demonstrations, load_prompts
from sera_jax.data.packing import Layout
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.saved import describe, find_policy
from sera_jax.loops.runtime import Runtime
from sera_jax.mesh import make_mesh
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.models.huggingface import save_pretrained
from sera_jax.writer import MetricWriter

NEW_TOKENS = 6
CONFIG = Config(
    world=WorldGroup(
        name="habits",
        pretrain=8,
        demonstrations=8,
        preferences=8,
        heldout_preferences=12,
        heldout_prompts=9,
        heldout_tasks=("last",),
    ),
    data=DataGroup(max_prompt_length=24, max_completion_length=32, row_tokens=96),
    sampling=SamplingGroup(max_new_tokens=NEW_TOKENS),
    loss=LossGroup(name="ipo", tau=0.25),
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROMPTS = ["repeat : saw red fig", "name : fruit tool animal", "first of : oak tin", "last of : cat dog"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The entries take all devices; here one, since a tiny model spread over eight only takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        for entry in (generate, evaluate):
            patch.setattr(entry, "make_mesh", lambda *sizes: make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        patch.setattr("sera_jax.loops.runtime.CPU_SCORE_TOKENS", 8 * 96)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A work directory with the policies `sft` and `sera/round2`, as a run leaves it."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.load(world.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, head_dim=8, max_position_embeddings=64
    )
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with MetricWriter(root, tensorboard=False) as writer:
        run = Runtime(
            cfg=cfg,
            mesh=mesh,
            workdir=Workdir(root, config_lib.to_dict(CONFIG)),
            writer=writer,
            seed=0,
            layout=Layout(96),
            chunk_tokens=64,
            stop_ids=tokenizer.stop_ids,
        )
        for seed, name in enumerate(("sft", "sera/round2")):
            run.store(name, {}, lambda seed=seed: init_params(cfg, key_for(seed, Stream.INIT)))
    describe(root, cfg, tokenizer)
    return root


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "id": f"q{i}"}) + "\n" for i, prompt in enumerate(PROMPTS)))
    return path


def test_rows_with_other_names_are_read_as_the_run_read_them_or_as_is_asked(workdir, prompts, tmp_path):
    renamed = tmp_path / "renamed.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    renamed.write_text("".join(json.dumps({"ask": {"text": row["prompt"]}, "id": row["id"]}) + "\n" for row in rows))
    plain = answers(workdir / "phases/sft", prompts, tmp_path / "a.jsonl")
    asked = answers(workdir / "phases/sft", renamed, tmp_path / "b.jsonl", "--columns=prompt:ask.text")
    assert [row["response"] for row in asked] == [row["response"] for row in plain]
    saved = find_policy(str(workdir / "phases/sft"))
    assert saved.reading(None, None) == Reading()
    told = dataclasses.replace(saved, run={"data": {"columns": "prompt:ask.text", "thoughts": "drop"}})
    assert told.reading(None, None) == Reading("prompt:ask.text", "drop")
    assert told.reading("", "keep") == Reading()


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    assert export.main([f"--checkpoint={workdir}/phases/sft", f"--out={out}"]) == 0
    return out


def answers(checkpoint, prompts, out, *options):
    code = generate.main([f"--checkpoint={checkpoint}", f"--prompts={prompts}", f"--out={out}", "--slots=4", *options])
    assert code == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def evaluation(out, *options):
    assert evaluate.main([f"--out={out}", "--slots=4", *options]) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_every_prompt_gets_all_its_answers_and_the_same_command_the_same_ones(workdir, prompts, tmp_path, capsys):
    first = answers(workdir / "phases/sera/round2", prompts, tmp_path / "a.jsonl", "--num_samples=3", "--seed=5")
    again = answers(workdir / "phases/sera/round2", prompts, tmp_path / "b.jsonl", "--num_samples=3", "--seed=5")
    other = answers(workdir / "phases/sera/round2", prompts, tmp_path / "c.jsonl", "--num_samples=3", "--seed=6")
    assert first == again
    assert first != other
    assert [(row["id"], row["sample"]) for row in first] == [
        (f"q{i}", k) for i in range(len(PROMPTS)) for k in range(3)
    ]
    assert {row["prompt"] for row in first} == set(PROMPTS)
    for row in first:
        assert set(row) == {"id", "prompt", "rendered", "sample", "response", "finished", "tokens", "logp"}
        assert 1 <= row["tokens"] <= NEW_TOKENS, "the run's own limit, since none was given"
        assert row["finished"] or row["tokens"] == NEW_TOKENS
        assert row["logp"] < 0
    shown = capsys.readouterr()
    assert "12 answers to 4 prompts" in shown.out
    assert shown.err.endswith("\n")
    assert "\r" not in shown.err


TALK = [{"role": "user", "content": "saw"}, {"role": "assistant", "content": "oak"}, {"role": "user", "content": "fig"}]
GIVEN = [
    {"prompt": "repeat : saw red fig", "response": "saw red fig", "level": 3, "half": "\ud800"},
    {"prompt": TALK, "completion": "fig"},
    {"messages": [*TALK, {"role": "assistant", "content": "fig"}], "source": "s"},
    {"prompt": "\n\nHuman: oak\n\nAssistant:", "chosen": "oak", "rejected": "tin"},
    {"chosen": "\n\nHuman: tin\n\nAssistant: oak", "rejected": "\n\nHuman: tin\n\nAssistant: red"},
]


def test_rows_of_answers_train_on_the_prompts_that_were_answered(workdir, tmp_path):
    """Prompts as given, with their other fields: the template is applied once, whatever shape the rows had."""
    asked, out = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in GIVEN))
    rows = answers(workdir / "phases/sft", asked, out, "--temperature=1", "--min_new_tokens=6")
    assert [row["prompt"] for row in rows] == [
        GIVEN[0]["prompt"],
        TALK,
        TALK,
        GIVEN[3]["prompt"],
        [{"role": "user", "content": "tin"}],
    ]
    assert [row.get("reference") for row in rows] == ["saw red fig", "fig", "fig", None, None]
    assert (rows[0]["level"], rows[0]["half"], rows[2]["source"], rows[3]["chosen"]) == (3, "\ud800", "s", "oak")
    tokenizer, limits = Tokenizer.load(workdir / "tokenizer"), Limits(24, 32, 96)
    prompts, _ = load_prompts(str(asked), tokenizer, limits=limits)
    trained, _ = load_demonstrations(str(out), tokenizer, limits=limits)
    for prompt, item, row in zip(prompts, trained, rows, strict=True):
        np.testing.assert_array_equal(item.prompt, prompt.prompt)
        assert tokenizer.decode_response(item.responses[0]) == row["response"]


def test_the_manifest_says_what_the_answers_depend_on(workdir, prompts, tmp_path):
    out = tmp_path / "a.jsonl"
    answers(workdir / "phases/sft", prompts, out, "--temperature=0.5", "--top_k=3")
    manifest = json.loads((tmp_path / "a.jsonl.manifest.json").read_text())
    assert manifest["sha256"] == file_digest(out)
    assert manifest["tokenizer"] == Tokenizer.load(workdir / "tokenizer").fingerprint()
    assert manifest["checkpoint"] == {"checksums.json": file_digest(workdir / "phases/sft/params/checksums.json")}
    assert {k: manifest["sampling"][k] for k in ("temperature", "top_k", "max_new_tokens")} == {
        "temperature": 0.5,
        "top_k": 3,
        "max_new_tokens": NEW_TOKENS,
    }
    assert manifest["command"]["seed"] == 0
    assert "jax" in manifest["versions"]


def test_the_exported_folder_answers_as_the_policy_it_was_made_from(workdir, exported, prompts, tmp_path):
    options = ("--temperature=0", f"--max_new_tokens={NEW_TOKENS}")
    ours = answers(workdir / "phases/sft", prompts, tmp_path / "a.jsonl", *options)
    theirs = answers(exported, prompts, tmp_path / "b.jsonl", *options)
    assert theirs == ours
    assert answers(workdir / "phases/sera/round2", prompts, tmp_path / "c.jsonl", *options) != ours


def test_an_export_of_an_export_is_the_same_bytes(exported, tmp_path):
    assert export.main([f"--checkpoint={exported}", f"--out={tmp_path / 'again'}"]) == 0
    for file in exported.iterdir():
        if file.name == "README.md":  # the card of a run
            continue
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_from_a_hugging_face_folder_is_exported_with_that_folders_config(workdir, exported, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    saved = find_policy(exported)
    params = saved.params(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    save_pretrained(source, saved.cfg, params, dtype="bfloat16", tokenizer_dir=exported)
    config = json.loads((source / "config.json").read_text()) | {"_remark": "kept"}
    (source / "config.json").write_text(json.dumps(config))
    shutil.copytree(workdir, run)
    describe(run, find_policy(source).cfg, Tokenizer.load(exported), str(source))
    assert export.main([f"--checkpoint={run}/phases/sft", f"--out={tmp_path / 'out'}"]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["_remark"] == "kept"
    assert written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("template", ["none", BRACKETS])
def test_a_policy_keeps_the_chat_template_it_was_trained_with(template, tmp_path, workdir):
    """The BPE brings the Human/Assistant one; `data.chat_template=none` must not be forgotten after training."""
    folder = train_bpe([*PROMPTS, "Human: hello", "Assistant: hello"], 300, out_dir=tmp_path / "bpe")
    trained_with = Tokenizer.load(folder, template)
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    describe(run, find_policy(workdir / "phases/sft").cfg, trained_with)
    saved = find_policy(run / "phases/sft")
    opened = Tokenizer.load(saved.tokenizer_dir)
    assert opened.fingerprint() == trained_with.fingerprint()
    np.testing.assert_array_equal(opened.encode_prompt("a b"), trained_with.encode_prompt("a b"))
    assert not np.array_equal(opened.encode_prompt("a b"), Tokenizer.load(folder).encode_prompt("a b"))


def test_a_work_directory_that_was_moved_still_opens(workdir, prompts, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(workdir, moved)
    before = answers(workdir / "phases/sft", prompts, tmp_path / "a.jsonl", "--temperature=0")
    assert answers(moved / "phases/sft", prompts, tmp_path / "b.jsonl", "--temperature=0") == before
    assert find_policy(moved / "phases/sft").tokenizer_dir == str(moved / "tokenizer")


@pytest.mark.parametrize("form", ["run", "exported"])
def test_the_reference_against_itself_is_a_draw_in_everything(form, workdir, exported, tmp_path):
    checkpoint = workdir / "phases/sft" if form == "run" else exported
    lengths = [f"--max_new_tokens={NEW_TOKENS}", "--max_prompt_length=24", "--row_tokens=96"]
    facts = evaluation(
        tmp_path / "out",
        f"--checkpoint={checkpoint}",
        f"--reference={workdir}/phases/sft",
        "--world=habits",
        *(lengths if form == "exported" else []),
    )
    assert facts["heldout_accuracy"] == 0.5
    assert facts["heldout_margin"] == 0.0
    assert facts["win_rate_vs_sft"] == 0.5


def test_another_policy_is_judged_on_the_worlds_pairs_and_prompts(workdir, tmp_path):
    facts = evaluation(
        tmp_path / "out",
        f"--checkpoint={workdir}/phases/sera/round2",
        f"--reference={workdir}/phases/sft",
        "--world=habits",
    )
    assert facts["loss"].startswith("ipo(") and "0.25" in facts["loss"], "the run's loss, as it was used"
    assert (facts["pairs"], facts["prompts"]) == (12, 9)
    assert facts["heldout_margin"] != 0.0
    assert facts["response_tokens_mean"] <= NEW_TOKENS
    assert set(facts["gold_by_task"]) == set(world.TASKS) and "gold_out_of_domain" in facts
    assert -0.3 <= facts["gold_ci95"][0] <= facts["gold_mean"] <= facts["gold_ci95"][1] <= 1
    shown = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert len(shown) == 9
    assert all(row["prompt"] and row["tokens"] <= NEW_TOKENS for row in shown)


def test_pairs_alone_are_enough_and_a_second_time_costs_nothing(workdir, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": prompt, "chosen": "red", "rejected": "blue saw"} for prompt in PROMPTS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (f"--checkpoint={workdir}/phases/sera/round2", f"--reference={workdir}/phases/sft", f"--pairs={pairs}")
    facts = evaluation(tmp_path / "out", *options)
    assert facts["pairs"] == 4
    assert facts["length_baseline_accuracy"] == 0.0
    assert "gold_mean" not in facts
    said = "policy, scoring the held-out pairs"
    assert said in capsys.readouterr().err
    assert evaluation(tmp_path / "out", *options) == facts
    assert said not in capsys.readouterr().err


REFUSALS = {
    "a policy that is not there": (
        generate.main,
        ["--checkpoint={run}/phases/sera/round9", "--prompts={prompts}", "--out={tmp}/a"],
        ["round9 does not exist", "{run}/phases/sera/round2"],
    ),
    "the work directory itself": (
        export.main,
        ["--checkpoint={run}", "--out={tmp}/a"],
        ["is no policy", "{run}/phases/sft, {run}/phases/sera/round2"],
    ),
    "no such place": (
        export.main,
        ["--checkpoint={tmp}/nowhere/x", "--out={tmp}/a"],
        ["does not exist", "WORKDIR/phases"],
    ),
    "prompts that are not there": (
        generate.main,
        ["--checkpoint={run}/phases/sft", "--prompts={tmp}/none.jsonl", "--out={tmp}/a"],
        ["none.jsonl"],
    ),
    "no answers asked for": (
        generate.main,
        ["--checkpoint={run}/phases/sft", "--prompts={prompts}", "--out={tmp}/a", "--num_samples=0"],
        ["--num_samples=0"],
    ),
    "a temperature below 0": (
        generate.main,
        ["--checkpoint={run}/phases/sft", "--prompts={prompts}", "--out={tmp}/a", "--temperature=-1"],
        ["temperature=-1"],
    ),
    "more than the model has positions for": (
        generate.main,
        ["--checkpoint={run}/phases/sft", "--prompts={prompts}", "--out={tmp}/a", "--max_new_tokens=64"],
        ["--max_new_tokens=64", "max_position_embeddings=64"],
    ),
    "nothing to evaluate on": (
        evaluate.main,
        ["--checkpoint={run}/phases/sft", "--reference={run}/phases/sft", "--out={tmp}/a"],
        ["--pairs", "--world=NAME (habits, wrong_habits)"],
    ),
    "an unknown loss": (
        evaluate.main,
        [
            "--checkpoint={run}/phases/sft",
            "--reference={run}/phases/sft",
            "--out={tmp}/a",
            "--world=habits",
            "--loss=dop",
        ],
        ["'dop'", "dpo"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_ends_with_2_and_a_message_that_helps(case, workdir, prompts, tmp_path, capsys):
    entry, argv, expected = REFUSALS[case]
    places = {"run": workdir, "prompts": prompts, "tmp": tmp_path}
    assert entry([word.format(**places) for word in argv]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("error: ")
    for part in expected:
        assert part.format(**places) in shown.err
    assert not (tmp_path / "a").is_file()


@pytest.mark.parametrize("name", ["model.json", "config.json", "tokenizer/tokenizer.json"])
def test_a_digit_changed_in_what_describes_a_policy_is_named(name, workdir, tmp_path, capsys):
    path = shutil.copytree(workdir, tmp_path / "run") / name
    digit = re.search(r": \d*([0-8])", path.read_text())
    assert digit is not None
    text = path.read_text()
    path.write_text(text[: digit.start(1)] + "9" + text[digit.end(1) :])
    assert export.main([f"--checkpoint={tmp_path}/run/phases/sft", f"--out={tmp_path}/a"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is not what was written; start the run's command again")


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"hidden_size": 8}, "source": ""}'])
def test_a_damaged_description_of_the_model_is_named(text, workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "model.json").write_text(text)
    assert export.main([f"--checkpoint={tmp_path}/run/phases/sft", f"--out={tmp_path}/a"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/run/model.json ")


def test_results_of_another_evaluation_are_not_overwritten(workdir, tmp_path, capsys):
    options = [f"--reference={workdir}/phases/sft", "--world=habits", f"--out={tmp_path / 'out'}", "--slots=4"]
    assert evaluate.main([f"--checkpoint={workdir}/phases/sft", *options]) == 0
    log = tmp_path / "out" / "metrics.jsonl"
    log.write_text('{"phase": "of a run that is at work')  # it would be mended
    assert evaluate.main([f"--checkpoint={workdir}/phases/sera/round2", *options]) == 2
    assert log.read_text() == '{"phase": "of a run that is at work'
    message = capsys.readouterr().err
    assert "choose another --out" in message
    assert "checkpoint" in message


def test_a_reference_of_another_shape_is_refused_by_what_differs(workdir, exported, tmp_path, capsys):
    cfg = dataclasses.replace(find_policy(exported).cfg, num_hidden_layers=1)
    save_pretrained(tmp_path / "small", cfg, init_params(cfg, jax.random.key(0)), tokenizer_dir=exported)
    argv = [f"--checkpoint={workdir}/phases/sft", f"--reference={tmp_path / 'small'}", "--world=habits"]
    assert evaluate.main([*argv, f"--out={tmp_path / 'out'}"]) == 2
    assert "num_hidden_layers differ" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [generate, evaluate])
def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused(entry, workdir, exported, tmp_path, capsys):
    """Their ids would be clamped: two prompts, one answer."""
    cfg = dataclasses.replace(find_policy(exported).cfg, vocab_size=find_policy(exported).cfg.vocab_size - 2)
    small = save_pretrained(tmp_path / "m", cfg, init_params(cfg, jax.random.key(0)), tokenizer_dir=exported)
    argv = {
        generate: [f"--prompts={tmp_path / 'p.jsonl'}", f"--out={tmp_path / 'o.jsonl'}"],
        evaluate: [f"--reference={small}", "--world=habits", f"--out={tmp_path / 'out'}"],
    }
    (tmp_path / "p.jsonl").write_text('{"prompt": "saw"}\n')
    assert entry.main([f"--checkpoint={small}", *argv[entry]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"only {cfg.vocab_size} embeddings" in error and "--tokenizer" in error
