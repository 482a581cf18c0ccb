"""SeRA with DPO on a real chat model, SmolLM2-135M-Instruct, on two CPU cores.

The model, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), as a folder:

    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct

The pairs: 1,100 short instructions with a polite and a rude answer each, from instruction-data-with-preference.json of
https://github.com/rasbt/LLMs-from-scratch (folder ch07/04_preference-tuning-with-dpo); as JSONL in
runs/data/polite_pairs.jsonl, in the way that docs/real-model.md shows. A quarter of them is read, other ones with
another seed: about 200 to train on, the rest is held out. Any other pairs: --config.data.train=pairs.jsonl.

The chat model is taken as its own SFT model. The gold reward is chrF against the preferred answers (`eval.gold`), which
needs sacrebleu: pip install sacrebleu; without it, --config.eval.gold= leaves it out.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.workdir = "runs/smollm2_sera"

    c.model.model_name_or_path = "models/SmolLM2-135M-Instruct"
    c.model.sft_model_path = "models/SmolLM2-135M-Instruct"  # so no SFT is run

    c.data.train = "runs/data/polite_pairs.jsonl=0.25"
    c.data.eval_fraction = 0.25
    c.data.row_tokens = 512
    c.data.max_prompt_length = 64  # the longest has 61 tokens
    c.data.max_completion_length = 64  # likewise
    c.data.max_row_shapes = 1
    c.data.label_noise = 0.2  # as the quickstart's; 0 for pairs of your own

    c.train.batch_size = 16
    c.train.learning_rate = 5e-6  # with one epoch a round, the gentle end of what such models are trained with

    c.loss.name = "dpo"

    c.sera.arms = ("daa", "sera", "sera_recommended")
    c.sera.rounds = 2

    c.sampling.max_new_tokens = 64
    c.sampling.slots = 64

    c.eval.gold = "chrf"
    c.eval.num_prompts = 64
    c.eval.temperatures = (0.0, 0.5, 1.0)

    c.log.logging_steps = 2
    return c
