"""Two processes of one run that start from the hub, as a user starts them: what each downloads."""

import os
import socket
import subprocess
import sys

import pytest

from sera_jax import world
from sera_jax.core import Stream, key_for
from sera_jax.models.decoder import init_params
from sera_jax.models.huggingface import save_pretrained
from tests.conftest import ROOT
from tests.experiment.brought_test import CFG, files_of
from tests.hub_server import serving
from tests.loops.tiny import TINY

pytestmark = pytest.mark.slow
FIELDS = {
    "model.model_name_or_path": "org/base",
    "data.train": "hub:org/rows",
    "world.name": "",
    "sera.rounds": 1,
    "sft.max_steps": 1,
    "train.max_steps": 1,
    "eval.num_prompts": -1,
}


@pytest.mark.parametrize(("homes", "times"), [(("a", "a"), 1), (("a", "b"), 2)])
def test_a_shared_cache_is_filled_once_and_each_of_two_by_itself(tmp_path, homes, times):
    tokenizer = world.write_tokenizer(tmp_path / "tokenizer")
    save_pretrained(tmp_path / "model", CFG, init_params(CFG, key_for(0, Stream.INIT)), tokenizer_dir=tokenizer)
    world.write_world(
        world.WorldSpec(preferences=64, demonstrations=4, pretrain=4, heldout_prompts=4), tmp_path / "rows"
    )
    rows = (tmp_path / "rows" / "preferences.jsonl").read_bytes()
    with socket.socket() as free, serving() as hub:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        hub.add("models/org/base", {**files_of(tmp_path / "model"), ".gitattributes": b"\n"})
        hub.add("datasets/org/rows", {"train.jsonl": rows, ".gitattributes": b"\n"})
        shape = ("model.hidden_size", "model.intermediate_size", "model.num", "model.head", "model.max")
        fields = {k: v for k, v in TINY.items() if not k.startswith(("world.", *shape))} | FIELDS
        command = [sys.executable, "-m", "sera_jax.main", "--config=configs/base.py"]
        command += [f"--config.{k}={v}" for k, v in {**fields, "workdir": tmp_path / "run"}.items()]
        command += [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "XLA_FLAGS": ""}
        running = [
            subprocess.Popen(
                [*command, f"--process_id={i}"],
                cwd=ROOT,
                env={**env, "HF_HOME": str(tmp_path / home)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, home in enumerate(homes)
        ]
        for process in running:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said
        sent = hub.files_sent()
    assert sent.count("model.safetensors") == sent.count("train.jsonl") == times
