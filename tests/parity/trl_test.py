"""Our losses against TRL's trainers, on the same weights and token batches (requirements-parity.txt).

A tiny Llama of random weights is trained by nobody: TRL's own `compute_loss` is called on one of its batches, and its
loss and its gradient by every weight are compared with ours, fed with log-probs that plain torch computes from the
logits of the same tokens. Our gradient by the weights is the chain rule through those log-probs.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sera_jax.losses.preference import PairInputs, ResolvedLoss, resolve
from tests.tolerances import TOLERANCES

torch = pytest.importorskip("torch", reason="TRL parity needs the packages of requirements-parity.txt (make parity)")
pytest.importorskip("trl", reason="TRL parity needs the packages of requirements-parity.txt (make parity)")

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

pytestmark = pytest.mark.parity

WORDS = [f"w{i}" for i in range(24)]
TEXTS = [  # prompt, chosen, rejected; lengths differ on purpose, and the space keeps the words apart
    ("w0 w1 w2 ", "w3 w4", "w5 w6 w7 w8 w9"),
    ("w4 ", "w10 w11 w12 w13 w14 w15 w16", "w17"),
    ("w9 w8 w7 w6 ", "w18 w19 w20", "w21 w22 w23"),
    ("w2 w2 ", "w1", "w1 w2 w3 w4 w5 w6"),
]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_llama(seed: int, vocab_size: int):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,  # so that log-probs differ visibly
    )
    return transformers.LlamaForCausalLM(config).eval()


def rows(count: int = len(TEXTS)):
    return datasets.Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in TEXTS[:count]]
    )


ARGS = dict(report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)


@pytest.fixture(scope="module")
def dpo_trainer(tokenizer, tmp_path_factory):
    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")), per_device_train_batch_size=len(TEXTS), beta=0.3, **ARGS
    )
    return DPOTrainer(
        model=tiny_llama(0, len(tokenizer)),
        ref_model=tiny_llama(1, len(tokenizer)),
        args=args,
        train_dataset=rows(),
        processing_class=tokenizer,
    )


def cpo_or_orpo(trainer, config, tokenizer, path, count, **values):
    """A reference-free trainer over the first `count` pairs, and its one batch."""
    args = config(
        output_dir=str(path),
        per_device_train_batch_size=count,
        max_length=64,
        remove_unused_columns=False,
        **ARGS,
        **values,
    )
    made = trainer(
        model=tiny_llama(0, len(tokenizer)), args=args, train_dataset=rows(count), processing_class=tokenizer
    )
    return made, next(iter(made.get_train_dataloader()))


def response_logps(model, input_ids, attention_mask, response_mask):
    """Summed log-probs and lengths of the masked tokens, from the logits: plain torch, no TRL."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    mask = response_mask[:, 1:].float()
    return (logps * mask).sum(1), mask.sum(1)


def ours(loss: ResolvedLoss, model, logp, length, ref_logp=None):
    """Mean loss, and its gradient by the torch weights through the log-probs [chosen..., rejected...]."""
    half = len(logp) // 2
    ref_logp = torch.zeros_like(logp) if ref_logp is None else ref_logp
    host = [x.detach().numpy() for x in (logp, length, ref_logp)]

    def total(both):
        return loss.loss(
            PairInputs(both[:half], both[half:], host[1][:half], host[1][half:], host[2][:half], host[2][half:])
        ).mean()

    value, by_logp = jax.value_and_grad(total)(host[0])
    model.zero_grad()
    (torch.from_numpy(np.array(by_logp)) * logp).sum().backward()
    return float(value), gradients(model)


def theirs(model, loss):
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model):
    return np.concatenate([p.grad.numpy().ravel().copy() for p in model.parameters()])


def assert_equal_to_trl(got, want):
    tol = TOLERANCES["trl"]
    np.testing.assert_allclose(got[0], want[0], rtol=tol["rtol"], atol=tol["atol"])
    assert np.abs(want[1]).max() > 100 * tol["atol"], "the comparison of gradients must see something"
    np.testing.assert_allclose(got[1], want[1], rtol=tol["rtol"], atol=tol["atol"])


@pytest.mark.parametrize(
    ("name", "values", "loss_type", "label_smoothing"),
    [
        ("dpo", {"beta": 0.3}, "sigmoid", 0.0),
        ("ipo", {"tau": 0.3}, "ipo", 0.0),
        ("slic", {"beta": 0.3}, "hinge", 0.0),
        ("robust", {"beta": 0.3, "label_smoothing": 0.2}, "robust", 0.2),
        ("apo_zero", {"beta": 0.3}, "apo_zero", 0.0),
        ("apo_down", {"beta": 0.3}, "apo_down", 0.0),
        ("dpo_norm", {"beta": 0.3}, "sigmoid_norm", 0.0),
    ],
)
def test_losses_with_a_reference_equal_trls_dpo_trainer(dpo_trainer, name, values, loss_type, label_smoothing):
    trainer = dpo_trainer
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [loss_type], [1.0], label_smoothing
    trained = trainer.model
    want = theirs(trained, trainer.compute_loss(trained, dict(batch)))
    got = ours(resolve(name, **values), trained, *with_reference(trainer, batch))
    assert_equal_to_trl(got, want)


def with_reference(trainer, batch):
    tokens = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    logp, length = response_logps(trainer.model, *tokens)
    with torch.no_grad():
        ref_logp, _ = response_logps(trainer.ref_model, *tokens)
    return logp, length, ref_logp


def test_label_smoothed_dpo_equals_trls_dpo_trainer(dpo_trainer):
    """TRL 1.16 ignores label_smoothing under `sigmoid`; under `aot` it does not, and aot of one pair sorts nothing."""
    trainer = dpo_trainer
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = ["aot"], [1.0], 0.2
    full = next(iter(trainer.get_train_dataloader()))
    for i in range(len(TEXTS)):
        batch = {key: torch.stack([x[i], x[len(TEXTS) + i]]) for key, x in full.items()}
        want = theirs(trainer.model, trainer.compute_loss(trainer.model, dict(batch)))
        got = ours(resolve("dpo", beta=0.3, label_smoothing=0.2), trainer.model, *with_reference(trainer, batch))
        assert_equal_to_trl(got, want)


def test_the_logged_rewards_equal_trls(dpo_trainer):
    trainer = dpo_trainer
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = ["sigmoid"], [1.0], 0.0
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._metrics["train"].clear(), trainer._metrics["eval"].clear()
    trainer.compute_loss(trainer.model, dict(batch))
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    logp, length, ref_logp = (x.detach().numpy() for x in with_reference(trainer, batch))
    reward = resolve("dpo", beta=0.3).reward(logp, length, ref_logp)
    chosen, rejected = reward[: len(TEXTS)], reward[len(TEXTS) :]
    tol = TOLERANCES["trl"]
    for name, value in {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "logps/chosen": logp[: len(TEXTS)].mean(),
    }.items():
        np.testing.assert_allclose(logged[name], [value], rtol=tol["rtol"], atol=tol["atol"])


def without_reference(trainer, batch):
    """Log-probs and lengths of a batch of the CPO and ORPO trainers, chosen responses first."""
    out = []
    for side in ("chosen", "rejected"):
        labels = batch[f"{side}_labels"]
        out.append(
            response_logps(trainer.model, batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], labels != -100)
        )
    (chosen, n_chosen), (rejected, n_rejected) = out
    return torch.cat([chosen, rejected]), torch.cat([n_chosen, n_rejected])


@pytest.mark.parametrize(
    ("name", "values", "trl"),
    [
        (
            "simpo",
            {"beta": 2.0, "gamma_beta_ratio": 0.5},
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        ),
        (
            "simpo",
            {"beta": 5.0, "gamma_beta_ratio": 0.1},
            {"loss_type": "simpo", "beta": 5.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0},
        ),
    ],
)
def test_simpo_equals_trls_cpo_trainer(tokenizer, tmp_path, name, values, trl):
    trainer, batch = cpo_or_orpo(CPOTrainer, CPOConfig, tokenizer, tmp_path, len(TEXTS), **trl)
    want = theirs(trainer.model, trainer.compute_loss(trainer.model, dict(batch)))
    assert_equal_to_trl(ours(resolve(name, **values), trainer.model, *without_reference(trainer, batch)), want)


def test_the_nll_anchor_equals_trls_cpo_alpha_on_one_pair(tokenizer, tmp_path):
    """TRL averages the anchor over the batch's tokens, we over each pair's: on one pair they are the same."""
    values = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.7}
    trainer, batch = cpo_or_orpo(CPOTrainer, CPOConfig, tokenizer, tmp_path, 1, **values)
    want = theirs(trainer.model, trainer.compute_loss(trainer.model, dict(batch)))
    loss = resolve("simpo", beta=2.0, gamma_beta_ratio=0.5, nll_coef=0.7)
    assert_equal_to_trl(ours(loss, trainer.model, *without_reference(trainer, batch)), want)


def test_orpo_equals_trls_orpo_trainer(tokenizer, tmp_path):
    """TRL's SFT term also scores the prompt; ours, as everywhere here, the response. The odds-ratio terms are compared
    on their own, and the sum with TRL's term computed from the same logits."""
    trainer, batch = cpo_or_orpo(ORPOTrainer, ORPOConfig, tokenizer, tmp_path, len(TEXTS), beta=0.4)
    model = trainer.model
    logp, length = without_reference(trainer, batch)
    losses, *_ = trainer.odds_ratio_loss(*(logp / length).chunk(2))
    want = theirs(model, -losses.mean())
    logp, length = without_reference(trainer, batch)
    assert_equal_to_trl(ours(resolve("orpo", beta=0.4, nll_coef=0.0), model, logp, length), want)

    whole = float(trainer.compute_loss(model, dict(batch)).detach())
    ids, attention = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    text_logp, text_length = response_logps(model, ids, attention, attention)
    sft = float(-text_logp.sum() / text_length.sum())
    tol = TOLERANCES["trl"]
    np.testing.assert_allclose(want[0] + sft, whole, rtol=tol["rtol"], atol=tol["atol"])
