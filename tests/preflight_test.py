"""The look ahead of time: every phase has its row, what does not fit is said with a way out, nothing is run."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from sera_jax import main, preflight, world
from sera_jax.aot import flops, topology
from sera_jax.aot.collectives import Collective, collectives
from sera_jax.aot.programs import held
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.data.rollouts import lay_rollouts
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment import rehearsal
from sera_jax.experiment.ahead import programs_of, sizes_of
from sera_jax.experiment.levers import smaller
from sera_jax.experiment.methods import METHODS, parse
from sera_jax.experiment.methods.srppo import study_of
from sera_jax.experiment.start import phases as start_phases
from sera_jax.loops.ppo import Learner
from sera_jax.loops.runtime import CPU_SCORE_TOKENS, SCORE_TOKENS
from sera_jax.loops.srppo import SRPPO_ARM
from sera_jax.models.config import ModelConfig
from sera_jax.models.lora import ADAPTERS
from sera_jax.models.parts import split
from sera_jax.training.step import TrainState
from tests.loops.tiny import tiny_config, tiny_flags, tiny_srppo

ROOT = pathlib.Path(__file__).resolve().parent.parent


def looked(folder, *arguments, check=False):
    """(Exit code, the report) of the command with these arguments."""
    command = ["sera_jax.preflight", *arguments, f"--out={folder}", f"--{'' if check else 'no'}check"]
    known = set(flags.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.chdir(ROOT)
        code = 0
        try:
            main.parse_flags(command)
            preflight.main(command[:1])
        except SystemExit as stopped:
            code = stopped.code
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
    report = pathlib.Path(folder) / "preflight.json"
    return code, json.loads(report.read_text()) if report.exists() else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def compiled(folder):
    """A tiny run of SeRA compiled for two devices: SFT, scorer and sampler; and what was printed."""
    with contextlib.redirect_stdout(open(folder / "said", "w")):
        code, report = looked(folder, *tiny_flags(folder), "--topology=cpu:2", "--only=sft,score pairs,candidates")
    return code, report, (folder / "said").read_text()


def test_every_phase_of_a_run_has_its_programs():
    """By the names that the run itself counts its phases by."""
    named = {
        r"init": "init: largest parameter",
        r"pretrain": "pretrain: update",
        r"sft": "sft: update",
        r".*/pool": "score pairs",
        r".*/heldout": "score pairs",
        r".*round\d": "train: update",
        r".*/pairs\d": None,  # on the host
        r".*/candidates": "candidates: decode",
        r".*/candidates_by_.*": "score candidates",
        r".*/iteration\d+": "srppo: policy update",
        r".*/generations(_at_.*)?": "answers: decode",
        r".*/(generations|draws)_by_.*": "score answers",
        r".*/heldout_demonstrations": "score answers",
    }
    sharper = dict(eval__temperature=0.0, eval__temperatures=(0.0, 1.0))
    for config in (make("runs/tiny", **how) for make in (tiny_config, tiny_srppo) for how in ({}, sharper)):
        programs, _, planned = programs_of(config, topology.find("gpu:h100:2"))
        names = {program.name: program for program in programs}
        assert len(names) == len(programs), "no name twice"
        phases = {*start_phases(config), *METHODS[config.method].phases(config, planned.given.corpus)}
        for phase in phases:
            rule = next(rule for rule in named if re.fullmatch(rule, phase))
            assert named[rule] is None or names[named[rule]].calls > 0, phase


@pytest.mark.parametrize(("name", "tokens"), [("gpu:h100:2", SCORE_TOKENS), ("cpu:2", CPU_SCORE_TOKENS)])
def test_as_much_is_scored_at_a_time_as_suits_the_devices_also_where_others_stand_for_them(name, tokens):
    config = tiny_config("runs/tiny")
    _, _, planned = programs_of(config, topology.find(name))
    items = [pair.item for pair in planned.given.corpus.train] * 40
    (shape,) = planned.given.runtime.batches_to_score(items).compiled
    assert shape[:2] == (tokens // config.data.row_tokens * 2, config.data.row_tokens)


@pytest.mark.parametrize(("asked", "tensor"), [(0, 1), (2, 2)])
def test_answers_are_looked_at_on_the_mesh_that_decodes_them(asked, tensor):
    config = tiny_config("runs/tiny", mesh__decode_tensor=asked)
    programs, mesh, _ = programs_of(config, topology.find("gpu:h100:2"))
    meshes = {program.name: dict((program.mesh or mesh).shape) for program in programs}
    assert meshes["candidates: decode"] == {"data": 2 // tensor, "fsdp": 1, "tensor": tensor}
    assert meshes["train: update"] == {"data": 1, "fsdp": 2, "tensor": 1}


def test_the_command_compiles_what_it_is_asked_for_and_prints_what_it_writes(compiled, folder):
    code, report, said = compiled
    assert code == 0 and report["fits"]
    parts = ("prepare", "empty cache", "prefill", "insert", "decode")
    assert [row["phase"] for row in report["rows"]] == [
        "sft: first state",
        "sft: update",
        "score pairs",
        *(f"candidates: {part}" for part in parts),
    ]
    lines = said.splitlines()
    header = re.split(r"\s{2,}", next(line for line in lines if line.strip().startswith("phase")).strip())
    for row in report["rows"]:
        line = next(line for line in lines if line.strip().startswith(row["phase"]))
        beside = sum(row["beside_gib"].values())
        assert row["total_gib"] == pytest.approx(row["program_gib"] + beside)
        for number in (row["program_gib"], beside, row["total_gib"]):
            assert f"{number:.2f}" in line
        assert row["compile_seconds"] > 0
        assert 0 <= row["flops"] <= row["matmul_flops"], "what is useful is done"
        useful = re.split(r"\s{2,}", line.strip())[header.index("useful %")]
        assert useful == (f"{100 * row['useful_share']:.0f}" if row["flops"] else "-")
        assert row["mesh"] == ("2 x 1 x 1" if row["phase"].startswith(("candidates", "answers")) else "1 x 2 x 1")
    update = report["rows"][1]
    assert {one["kind"] for one in update["collectives"]} >= {"all-gather", "all-reduce"}
    assert (folder / "preflight.png").stat().st_size > 10_000


def test_a_program_is_given_its_arguments_beside_what_else_is_alive(compiled):
    rows = {row["phase"]: row for row in compiled[1]["rows"]}
    assert rows["score pairs"]["beside_gib"] == {}, "policies lie on disk, and with them their moments"
    assert set(rows["candidates: decode"]["beside_gib"]) == {"parameters", "prefilled"}
    state, update = rows["sft: first state"]["program_gib"], rows["sft: update"]["program_gib"]
    assert update > state > 0, "gradients and activations come on top of parameters and moments"


def test_a_phase_that_does_not_fit_ends_with_1_and_an_override_that_fits(compiled, folder, capsys):
    limit = next(row["total_gib"] for row in compiled[1]["rows"] if row["phase"] == "candidates: decode") * 0.9
    how = ["--topology=cpu:2", "--only=candidates: decode", f"--limit_gib={limit}"]
    code, report = looked(folder / "misfit", *tiny_flags(folder), *how)
    said, tried = capsys.readouterr()
    assert code == 1 and not report["fits"]
    assert "does not fit: candidates: decode takes" in said
    (override,) = report["overrides"]
    assert override.startswith("--config.sampling.slots=") and f"fits with: {override}" in said
    assert looked(folder / "mended", *tiny_flags(folder), override, *how)[0] == 0
    slots = int(override.partition("=")[2])
    larger = min(value for value in (*smaller(tiny_config("x"), "sampling.slots", 2), 32) if value > slots)
    assert larger == 32 or f"trying --config.sampling.slots={larger}" in tried, "the largest that fits"


def test_an_update_that_does_not_fit_is_accumulated(folder):
    """On GPUs, whose figures are an estimate: nothing is compiled."""
    flags_ = tiny_flags(folder, train__batch_size=4, train__gradient_accumulation_steps=1)
    how = [*flags_, "--topology=gpu:h100:2", "--only=train"]
    _, report = looked(folder / "gpu", *how)
    assert report["estimate"] and all(row["compile_seconds"] is None for row in report["rows"])
    limit = report["rows"][-1]["total_gib"] * 0.999
    code, report = looked(folder / "gpu_less", *how, f"--limit_gib={limit}")
    assert (code, report["overrides"]) == (1, ["--config.train.gradient_accumulation_steps=2"])


def test_what_ppo_holds_is_counted_beside_its_programs():
    programs, mesh, _ = programs_of(tiny_srppo("runs/tiny"), topology.find("gpu:h100:2"))
    names = {program.name: program for program in programs}
    state = names["srppo: values"].arguments({})[0], names["score answers"].arguments({})[0]
    critic, model = (held(tree, mesh.size) for tree in state)
    beside = names["srppo: policy update"].beside({"srppo: rewards and advantages": [[]]})
    sizes = {name: held(tree, mesh.size) for name, tree in beside.items()}
    assert sizes["critic"] == critic and sizes["SFT model"] == sizes["base model"] == model
    assert sizes["critic's moments"] == pytest.approx(2 * critic, rel=1e-3), "AdamW has two"
    assert "policy" not in sizes and "spare state" in sizes, "a state this small is kept twice"
    assert names["score answers"].beside({}) == {}


def alive(programs, name, devices):
    """Bytes of the models and states that lie on a device at a program: its arguments, and what is beside."""
    rows = "srppo: rewards and advantages"
    made = {rows: [[None]], "srppo: score": None, "srppo: values": None}
    models = [argument for argument in programs[name].arguments(made) if isinstance(argument, dict | TrainState)]
    return held(models, devices), sum(held(tree, devices) for tree in programs[name].beside(made).values())


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, ("base", "sft")),
        ({"lora__rank": 2, "model__tie_word_embeddings": False}, ("base", "adapters")),
        ({"lora__rank": 2, "ppo__critic": "head"}, ("base", "adapters")),
        ({"train__trainable": (".*norm/scale",)}, ("base", "sft")),
        ({"train__trainable": (".*norm/scale",), "sft__trainable": (".*norm/scale",)}, ("base", "norms")),
    ],
)
def test_at_every_program_of_an_iteration_the_same_models_are_alive(changes, kept):
    """As arguments or beside them: the state with its spare, the base, and of the SFT model what it does not share."""
    programs, mesh, planned = programs_of(tiny_srppo("runs/tiny", **changes), topology.find("gpu:h100:2"))
    named = {program.name: program for program in programs}
    state = Learner(
        study_of(planned.given, planned.given.evaluator(base=planned.given.base)), SRPPO_ARM
    ).programs.abstract
    base, sft = planned.models
    shared = {"base": base, "sft": sft, "adapters": split(sft, ADAPTERS)[0], "norms": split(sft, ".*norm/scale")[0]}
    control = held(state.control, mesh.size)
    expected = 2 * held(state, mesh.size) - control + sum(held(shared[name], mesh.size) for name in kept)
    steps = [name for name in named if re.match("srppo: (score|values|rewards|.* update)", name)]
    assert len(steps) >= 4
    for name in steps:
        assert sum(alive(named, name, mesh.size)) == pytest.approx(expected, abs=64), name  # a step and a flag
    sampling = named["srppo: rollouts: prefill"].beside({})
    assert sum(held(tree, mesh.size) for tree in sampling.values()) == pytest.approx(expected, abs=64)


@pytest.mark.parametrize("method", ["sera", "online_dpo", "srppo"])
def test_a_base_from_scratch_is_planned_whole_and_all_after_it_as_adapters(method):
    config = (tiny_srppo if method == "srppo" else tiny_config)("runs/tiny", method=method, lora__rank=2)
    programs, mesh, planned = programs_of(config, topology.find("gpu:h100:2"))
    whole, (part, _) = held(planned.models[0], mesh.size), planned.given.start.trained.divide(planned.models[1])
    for name, states in ((p.name, p.arguments({})) for p in programs if p.name.endswith("first state")):
        if name.startswith("pretrain"):
            assert held(states, mesh.size) == whole
        elif not name.startswith("srppo"):  # whose first state is made of the SFT model
            assert held(states, mesh.size) == held(part, mesh.size), name


@pytest.mark.parametrize("devices", [1, 8])
def test_an_update_of_ppo_is_split_as_its_own_rows_are_which_may_be_shorter_than_those_of_the_data(devices):
    programs, *_ = programs_of(tiny_srppo("runs/tiny"), topology.find(f"cpu:{devices}"))
    updates = [
        program for program in programs if program.name.startswith("srppo: ") and program.name.endswith("update")
    ]
    assert len(updates) == 2 and all(update.working > 0 for update in updates)


def test_an_attention_that_the_devices_do_not_have_is_refused_in_a_line(folder, capsys):
    named = "--config.model.attn_implementation=splash"
    assert looked(folder / "none", *tiny_flags(folder), named, "--topology=cpu:2") == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: config.model.attn_implementation='splash' runs on tpu devices, and these are cpu;")
    assert looked(folder / "estimated", *tiny_flags(folder), named, "--topology=gpu:h100:2") == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: config.model.attn_implementation='splash' runs on tpu devices, and these are cuda;")
    for name in ("xla_loop", "auto"):
        how = tiny_flags(folder, data__row_tokens=256, model__attn_implementation=name)
        code, report = looked(folder / name, *how, "--topology=gpu:h100:2", "--only=train: update")
        assert code == 0 and 0 < report["rows"][-1]["useful_share"] <= 1, (
            "traced with what GPUs compute, not with tiles"
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [("v5e-16", "give a TPU slice as v5e:4x4"), ("cpu:x", "is unknown"), ("gpu:z9:8", "h100"), ("tpu9:2x2", "v5p")],
)
def test_an_unknown_topology_is_refused_with_those_that_are_known(name, words, folder, capsys):
    assert looked(folder / "none", *tiny_flags(folder), f"--topology={name}") == (2, None)
    assert words in capsys.readouterr().err


def test_without_the_tpu_compiler_it_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    topology._tpu.cache_clear()
    assert looked(folder / "none", *tiny_flags(folder), "--topology=v5e:2x2") == (2, None)
    assert "pip install libtpu" in capsys.readouterr().err


def test_a_tiny_scorer_and_an_update_are_compiled_for_a_tpu_with_its_attention(folder):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install libtpu")
    how = ["--topology=v5e:2x2", "--only=score pairs,train", "--nocheck", f"--out={folder / 'tpu'}"]
    command = [sys.executable, "-m", "sera_jax.preflight", *tiny_flags(folder), *how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # libtpu changes its process
    assert done.returncode == 0, done.stderr
    assert "attention: splash\n" in done.stderr
    report = json.loads((folder / "tpu" / "preflight.json").read_text())
    assert report["limit_gib"] == pytest.approx(15.75, abs=0.01) and report["hours"] > 0
    assert report["rows"][0]["collectives"], "weights are gathered"


def test_useful_flops_are_those_of_every_matmul_counted_by_hand():
    cfg = ModelConfig(
        vocab_size=11, hidden_size=6, intermediate_size=10, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    matmul = lambda m, k, n: 2 * m * k * n  # noqa: E731
    tokens, scored = 5, 3
    layer = (
        matmul(tokens, 6, 16) + 2 * matmul(tokens, 6, 8) + matmul(tokens, 16, 6)  # q, k and v, o
        + 3 * matmul(tokens, 6, 10)  # gate, up, down
        + sum(2 * 4 * matmul(1, 4, seen) for seen in (1, 2, 3, 4, 5))  # scores and values of four heads
    )  # fmt: skip
    given = flops.Tokens(tokens, 1 + 2 + 3 + 4 + 5, scored)
    assert flops.forward(cfg, given) == 3 * layer + matmul(scored, 6, 11)
    assert flops.forward(cfg, given, vocabulary=False) == 3 * layer + matmul(scored, 6, 1)
    assert flops.update(cfg, given) == 3 * flops.forward(cfg, given)
    assert flops.of_prompts(2, 5) == (10, 30, 0)


def test_keys_of_packed_rows_are_those_that_the_mask_lets_through():
    items = [Item("a", np.ones(3, np.int32), (np.ones(2, np.int32), np.ones(4, np.int32)))]
    items.append(Item("b", np.ones(2, np.int32), (np.ones(1, np.int32),) * 2))
    rows = lay_rollouts(items, 1, Layout(16), seed=0, iteration=1)[0].rows
    seen = 0
    for segment, branch in zip(rows.segment, rows.branch):
        for q in range(16):
            for k in range(q + 1):
                same = segment[q] == segment[k] > 0
                seen += bool(same and branch[k] in (0, branch[q]))
    assert flops.of_rows(rows) == (13, seen, 8)


HLO = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, dimensions={0}
  %inner = (s32[], f32[8]) while(%t), condition=%cond, body=%deep, backend_config={"known_trip_count":{"n":"3"}}
}

%deep (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%w), channel_id=2, dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%bound (p: (s32[], f32[8])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %seven), direction=LT
}

%bound_of_ring (p: (f32[8], u32[])) -> pred[] {
  %seven = u32[]{:T(128)} constant(7)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %seven), direction=LT
}

%scan (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = f32[6]{0} all-to-all(%a), channel_id=6
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %carry = (s32[]{:T(128)}, f32[8]) tuple(%next, %x)
}

%ring (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %q = f32[5]{0} collective-permute(%a), channel_id=9
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %carry = (f32[8], u32[]{:T(128)}) tuple(%x, /*index=1*/%next)
}

%decode (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (f32[2]{0}, s32[2]{0}) all-reduce(%a, %b), channel_id=3, to_apply=%add
}

%all-reduce-scatter.2 (input: f32[8]) -> f32[2] {
  %r = f32[8]{0} all-reduce(%input), channel_id=8, to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={2}
}

ENTRY %main (w: f32[4]) -> f32[] {
  %loop = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %endless = (s32[], f32[8]) while(%t), condition=%cond, body=%decode
  %noteless = (s32[], f32[8]) while(%t), condition=%bound, body=%scan
  %pieces = (f32[8], u32[]) while(%t), condition=%bound_of_ring, body=%ring
  %p = f32[10]{0} collective-permute(%w), channel_id=4
  %send = (f32[6,8]{1,0:T(8,128)}, u32[]) send(%b), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[6,8]{1,0:T(8,128)}, u32[]) recv(%a), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %scattered = f32[2]{0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.2
  %callback = (f32[9]{0}, u32[], token[]) send(%c, %after-all), channel_id=7, is_host_transfer=true
  ROOT %all = f32[] all-reduce(%x), channel_id=5, to_apply=%add
}
"""


def test_collectives_count_once_a_trip_where_the_trips_are_known():
    assert collectives(HLO) == [
        Collective("all-gather", 5 + 5 * 3, 5 * 16 * 128 * 2 + 15 * 8 * 4),
        Collective("all-reduce between slices", 1, 6 * 8 * 4),
        Collective("all-to-all", 7, 7 * 24),
        Collective("collective-permute", 1 + 4, 40 + 4 * 20),
        Collective("all-reduce", 1, 16, each_step=True),
        Collective("reduce-scatter", 1, 8),
        Collective("all-reduce", 1, 4),
    ]


def test_rows_are_counted_where_the_files_are_there(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("{}\n" * 50)
    config = tiny_config(
        "runs/tiny", world__name="", data__train=str(rows), data__eval_fraction=0.2, model__vocab_size=64
    )
    sizes = sizes_of(config)
    assert (sizes.pairs, sizes.heldout, sizes.demonstrations, sizes.assumed) == (40, 10, 40, ())
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, train="gone.jsonl"))
    assert sizes_of(gone).assumed == ("data.train",)


@pytest.mark.parametrize(
    "path", ["llama_dpo", "llama_srppo", "quickstart", "quickstart_srppo", "online_dpo", "hh_small"]
)
def test_shipped_configs_are_planned(path):
    spec = importlib.util.spec_from_file_location(path, ROOT / "configs" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    programs, _, _ = programs_of(parse(module.get_config()), topology.find("gpu:h100:8"))
    assert all(jax.tree.leaves(program.arguments({})) for program in programs if program.name.endswith("first state"))
    assert sum(program.flops * program.calls for program in programs) > 0


def test_laws_are_tried_on_the_first_rows_by_the_users_own_tokenizer(tmp_path, folder):
    world.write_world(world.WorldSpec(name="habits", pretrain=1, demonstrations=2, preferences=20), tmp_path / "world")
    own = {
        "world__name": "",
        "data__train": str(tmp_path / "world" / "preferences.jsonl"),
        "model__tokenizer_name_or_path": str(tmp_path / "world" / "tokenizer"),
    }
    how = ["--topology=gpu:h100:2", "--only=init"]
    code, report = looked(folder / "laws", *tiny_flags(folder, **own), *how, check=True)
    assert code == 0
    assert {law["law"]: law["holds"] for law in report["laws"]} == {
        "packed = padded": True,
        "step-0 reward = 0": True,
        "step-0 loss = log 2": True,
        "answers alone are scored": True,
        "BOS once or never": True,
        "answers end": True,
    }
    assert "preferences.jsonl" in report["laws"][0]["seen"]
    assert "16 of 16" in report["laws"][-1]["seen"], "eight rows, two answers each"
    code, report = looked(folder / "none", *tiny_flags(folder, **own | {"data__train": "none.jsonl"}), *how, check=True)
    assert code == 0
    assert "answers end" not in {law["law"] for law in report["laws"]}, "made-up rows say nothing of the tokenizer"


@pytest.mark.parametrize("layers", [1, 3])
def test_the_laws_are_tried_on_a_model_whose_layers_differ(layers):
    types = ("sliding_attention", "full_attention", "full_attention")[:layers]
    cfg = ModelConfig(num_hidden_layers=layers, layer_types=types, sliding_window=16)
    assert rehearsal.tiny(cfg).layer_types == (*types, "sliding_attention")[:2]


def test_a_law_that_does_not_hold_is_told_and_ends_with_1(folder, capsys, monkeypatch):
    """A prompt with BOS twice, and answers without an end."""
    tokenizer = Tokenizer.load(world.write_tokenizer(folder / "tokenizer"))
    bos = np.array([tokenizer.bos_id, tokenizer.bos_id], np.int32)
    broken = [Item("a", bos, (np.array([7, 8], np.int32),))]
    findings = rehearsal._ends(broken, tokenizer, "")
    assert [one.holds for one in findings] == [False, False]
    monkeypatch.setattr(rehearsal, "rehearse", lambda planned: findings)
    code, _ = looked(folder / "broken", *tiny_flags(folder), "--topology=gpu:h100:2", "--only=init", check=True)
    assert code == 1
    assert "DOES NOT HOLD: BOS once or never (1 of 1 prompts begin with it, 1 twice)" in capsys.readouterr().out
