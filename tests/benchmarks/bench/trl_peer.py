"""TRL's DPO trainer and transformers' generate, as they are best on this machine.

The losses and log-probs are TRL's own (`DPOTrainer.compute_loss`, `compute_ref_log_probs`, its collator, its fused
output projection); the loop around them is the barest one, without the trainer's logging and saving. Attention is
torch's `sdpa`; batches are padded to their longest sequence (TRL's padding-free path is switched off in this release).
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

from tests.benchmarks.bench import works
from tests.benchmarks.bench.works import Pair, Work

NAME = f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"


def _load(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def _trainer(model: Any, reference: Any, cached: bool) -> Any:
    """A trainer whose losses are called; its own rows are never read."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "a", "b"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    args = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=None,
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}]),
        processing_class=tokenizer,
    )
    trainer.precompute_ref_logps = cached
    return trainer


def _batch(trainer: Any, pairs: Sequence[Pair], logps: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    rows: list[dict[str, Any]] = [
        {"prompt_ids": p.prompt.tolist(), "chosen_ids": p.chosen.tolist(), "rejected_ids": p.rejected.tolist()}
        for p in pairs
    ]
    for row, logp in zip(rows, [] if logps is None else logps, strict=False):
        row |= {"ref_chosen_logps": float(logp[0]), "ref_rejected_logps": float(logp[1])}
    return trainer.data_collator(rows)


class Dpo:
    def __init__(
        self,
        folder: pathlib.Path,
        pairs: Sequence[Pair],
        *,
        batch: int,
        in_step: bool,
        micro: int = 0,
        epoch: bool = False,
        a_token: float = works.RANDOM_A_TOKEN,
    ) -> None:
        path = folder / works.MODEL if (folder / works.MODEL).is_dir() else folder
        self.model = _load(path)
        self.trainer = _trainer(self.model, _load(path) if in_step else None, not in_step)
        self.pairs, self.batch, self.micro = list(pairs), batch, micro or batch
        self.logps = works.reference_logps(self.pairs, a_token)
        self.in_step, self.at = in_step, 0
        self.steps = len(self.pairs) // batch if epoch else works.STEPS
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0)
        self.model.train()

    def check(self) -> list[float]:
        batch = _batch(self.trainer, self.pairs[: works.CHECKED])
        chosen, rejected = self.trainer.compute_ref_log_probs(self.model, batch)
        self.round()
        return torch.stack([chosen, rejected], 1).ravel().tolist()

    def round(self) -> dict[str, float]:
        tokens = 0
        for _ in range(self.steps):
            start = self.at * self.batch % len(self.pairs)
            tokens += self._update(range(start, min(start + self.batch, len(self.pairs))))
            self.at += 1
        return {"tokens": tokens, "repeats": self.steps}

    def _update(self, which: range) -> int:
        parts = [which[i : i + self.micro] for i in range(0, len(which), self.micro)]
        for part in parts:
            pairs = [self.pairs[i] for i in part]
            logps = None if self.in_step else self.logps[list(part)]
            loss = self.trainer.compute_loss(self.model, _batch(self.trainer, pairs, logps))
            (loss * len(part) / len(which)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(self.pairs[i].tokens for i in which)


class Scoring:
    """In batches of 16 pairs of similar length, so that little is padding."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.pairs = works.random_pairs(seed=1)
        self.models = [_load(folder / name).eval() for name in (works.MODEL, works.REFERENCE)]
        self.trainer = _trainer(self.models[0], self.models[1], False)
        self.order = sorted(
            range(len(self.pairs)), key=lambda i: max(len(self.pairs[i].chosen), len(self.pairs[i].rejected))
        )

    def _score(self, model: Any) -> np.ndarray:
        out = np.zeros((len(self.pairs), 2))
        for i in range(0, len(self.order), 16):
            part = self.order[i : i + 16]
            found = self.trainer.compute_ref_log_probs(model, _batch(self.trainer, [self.pairs[j] for j in part]))
            out[part] = torch.stack(found, 1).numpy()
        return out

    def check(self) -> list[float]:
        return [x for model in self.models for x in self._score(model)[: works.CHECKED].ravel().tolist()]

    def round(self) -> dict[str, float]:
        for model in self.models:
            self._score(model)
        return {"tokens": 2 * sum(pair.tokens for pair in self.pairs)}


class Sampling:
    """With a static cache, and not by torch.compile, which takes nearly twice as long here."""

    def __init__(self, folder: pathlib.Path, top_p: float) -> None:
        self.model, self.top_p = _load(folder / works.MODEL).eval(), top_p
        self.prompts = torch.tensor(np.stack(works.random_prompts(works.PROMPTS)).astype(np.int64))

    def _generate(self, prompts: torch.Tensor, **how: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model.generate(
                prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, cache_implementation="static", **how
            )

    def check(self) -> list[float]:
        self.round()
        out = self._generate(
            self.prompts[:4], do_sample=False, max_new_tokens=16, min_new_tokens=16, eos_token_id=works.STOP_ID
        )
        return [float(token) for token in out[:, works.PROMPT_TOKENS :].ravel()]

    def round(self) -> dict[str, float]:
        new = works.NEW_TOKENS
        how = dict(do_sample=True, temperature=works.TEMPERATURE, top_p=self.top_p, top_k=0)
        out = self._generate(self.prompts, max_new_tokens=new, min_new_tokens=new, eos_token_id=works.STOP_ID, **how)
        return {"tokens": out[:, works.PROMPT_TOKENS :].numel()}


def _smollm2() -> Dpo:
    folder, pairs, a_token = pathlib.Path(os.environ[works.SMOLLM2]), works.polite_pairs(), works.SMOLLM2_A_TOKEN
    return Dpo(folder, pairs, batch=works.REAL_BATCH, in_step=False, micro=4, a_token=a_token)


WORKS: dict[str, Any] = {
    "W1": lambda folder: Dpo(folder, works.random_pairs(), batch=works.BATCH, in_step=True),
    "W1c": lambda folder: Dpo(folder, works.random_pairs(), batch=works.BATCH, in_step=False),
    "W2": Scoring,
    "W3": lambda folder: Sampling(folder, 1.0),
    "W3p": lambda folder: Sampling(folder, 0.9),
    "W5": lambda folder: Dpo(folder, works.hh_pairs(), batch=works.REAL_BATCH, in_step=False, micro=4, epoch=True),
    "W6": lambda folder: _smollm2(),
}


def work(name: str, folder: pathlib.Path) -> Work:
    return WORKS[name](folder)
