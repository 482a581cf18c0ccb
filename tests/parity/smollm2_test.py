"""A real model, SmolLM2-135M-Instruct, against transformers and TRL: logits, answers, the export, three DPO updates.

    SERA_JAX_SMOLLM2=FOLDER python -m pytest tests/parity/smollm2_test.py -m slow

FOLDER holds the model as Hugging Face has it. Minutes; about 4 GB of memory.
"""

import gzip
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: requirements-parity.txt")
trl = pytest.importorskip("trl", reason="TRL parity needs the packages of requirements-parity.txt (make parity)")

import datasets  # noqa: E402
import jax  # noqa: E402
import transformers  # noqa: E402

from sera_jax.config import TrainGroup  # noqa: E402
from sera_jax.data.batches import PairLoader, score_batches  # noqa: E402
from sera_jax.data.items import Item, PairItem  # noqa: E402
from sera_jax.data.packing import Layout, gather_scores  # noqa: E402
from sera_jax.export import export  # noqa: E402
from sera_jax.losses.preference import resolve  # noqa: E402
from sera_jax.mesh import make_mesh  # noqa: E402
from sera_jax.models.decoder import hidden_states, unembedding  # noqa: E402
from sera_jax.models.huggingface import file_tensors, load_pretrained  # noqa: E402
from sera_jax.sampling import Draws, SamplingParams, generate  # noqa: E402
from sera_jax.training.objectives import align_objective  # noqa: E402
from sera_jax.training.optimizer import init_optimizer, make_optimizer  # noqa: E402
from sera_jax.training.score import make_score  # noqa: E402
from sera_jax.training.step import abstract_state, init_state, make_step, place_batch  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PROMPTS, NEW_TOKENS, ROW = 20, 64, 2048
PAIRS, UPDATES, RATE, BETA = 4, 3, 1e-5, 0.1


@pytest.fixture(scope="module")
def folder():
    path = os.environ.get("SERA_JAX_SMOLLM2", "")
    if not path:
        pytest.skip("SERA_JAX_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(shared_data, tokenizer):
    """Polite pairs: (prompt with the chat template's opening of an answer, chosen, rejected)."""

    def prompt(row):
        turns = [{"role": "user", "content": row["prompt"]}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    with gzip.open(shared_data / "preference" / "rasbt_polite_pairs.jsonl.gz", "rt") as lines:
        read = [json.loads(line) for _, line in zip(range(PROMPTS), lines, strict=False)]
    return [(prompt(row), row["chosen"], row["rejected"]) for row in read]


def torch_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens[None].astype(np.int64))).logits.numpy()


def test_logits_answers_and_the_export_are_those_of_transformers(folder, tokenizer, rows, tmp_path):
    model = torch_model(folder)
    cfg, params = load_pretrained(folder)
    prompts = [np.array(tokenizer(row[0])["input_ids"], np.int32) for row in rows]
    for tokens in prompts[:4]:
        (packed,) = score_batches([Item("0", tokens[:1], (tokens[1:],))], Layout(len(tokens)), 1)
        ours = jax.jit(lambda p, r=packed.rows: unembedding(cfg, p)(hidden_states(cfg, p, r)))(params)
        np.testing.assert_allclose(ours, torch_logits(model, tokens), rtol=0, atol=3e-4)  # where logits reach 30

    sampling = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, stop_ids=(tokenizer.eos_token_id,))
    samples = generate(cfg, params, Draws(prompts, range(len(prompts))), sampling, slots=10)
    how = dict(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    for tokens, sample in zip(prompts, samples, strict=True):
        given = torch.tensor(tokens[None].astype(np.int64))
        theirs = model.generate(given, attention_mask=torch.ones_like(given), **how)[0, len(tokens) :].numpy()
        np.testing.assert_array_equal(sample.tokens, theirs)

    export(params, cfg, tmp_path / "out", source=folder, tokenizer_dir=folder)
    again = torch_model(tmp_path / "out")
    np.testing.assert_array_equal(torch_logits(again, prompts[0]), torch_logits(model, prompts[0]))


def of_trl(folder, tokenizer, rows, path):
    """(the one batch as items, TRL's losses, the tensors after its updates)."""
    args = trl.DPOConfig(
        output_dir=str(path),
        per_device_train_batch_size=PAIRS,
        max_steps=UPDATES,
        num_train_epochs=UPDATES,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=1024,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_dropout=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows[:PAIRS]]
    )
    trainer = trl.DPOTrainer(
        model=torch_model(folder),
        ref_model=torch_model(folder),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = {name: value.numpy() for name, value in next(iter(trainer.get_train_dataloader())).items()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    after = {name: value.detach().numpy() for name, value in trainer.model.named_parameters()}
    tokens, real, answer = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    prompt = [tokens[i][(real[i] > 0) & (answer[i] == 0)] for i in range(PAIRS)]
    response = [tokens[i][answer[i] > 0] for i in range(2 * PAIRS)]
    pairs = zip(prompt, response[:PAIRS], response[PAIRS:], strict=True)
    return [Item(str(i), p, (c, r)) for i, (p, c, r) in enumerate(pairs)], losses, after


def test_three_dpo_updates_are_those_of_trl(folder, tokenizer, rows, tmp_path):
    items, their_losses, theirs = of_trl(folder, tokenizer, rows, tmp_path)
    cfg, params = load_pretrained(folder)
    mesh, layout = make_mesh(1, 1, 1, devices=jax.devices()[:1]), Layout(ROW)
    batches = score_batches(items, layout, PAIRS)
    how = dict(window=ROW, chunk_tokens=1024)
    score = make_score(cfg, mesh, **how)
    with jax.set_mesh(mesh):
        reference = gather_scores([np.asarray(score(params, packed.rows)) for packed in batches], batches, items)
        pairs = [PairItem(item, ref_logp=logp) for item, logp in zip(items, reference, strict=True)]
        group = TrainGroup(batch_size=PAIRS, learning_rate=RATE, lr_scheduler_type="constant", warmup_ratio=0.0)
        optimizer = make_optimizer(group, UPDATES)
        abstract = abstract_state(cfg, optimizer, mesh)
        objective = align_objective(cfg, resolve("dpo", beta=BETA), shards=1, **how)
        step = make_step(objective, optimizer, abstract, mesh)
        before = dict(file_tensors(cfg, jax.device_get(params)))
        state = init_state(params, init_optimizer(optimizer, params, master_weights=True))
        loader, losses = PairLoader(pairs, layout, batch_size=PAIRS, seed=0), []
        for update in range(UPDATES):
            state, metrics = step(state, place_batch(loader.batch(update).arrays, 1, mesh))
            losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    np.testing.assert_allclose(losses, their_losses, atol=2e-4)  # TRL rounds to four digits
    assert losses[-1] < losses[0] - 0.01, "the updates must do something"
    ours = dict(file_tensors(cfg, jax.device_get(state.params)))
    moved = {name: theirs[name] - before[name] for name in ours}
    apart = sum(float(np.sum((ours[name] - theirs[name]) ** 2)) for name in ours)
    assert apart <= (0.02**2) * sum(float(np.sum(change**2)) for change in moved.values())
