"""SmolLM2-135M-Instruct on pairs of its own answers that a lexicon of sentiment labelled: 6 runs of the plain loss, the
method as published and as recommended.

python -m sera_jax.study --config=studies/smollm2_sentiment.py

The controlled setting of Rafailov et al. (2023, arXiv:2305.18290, section 6.1): the gold is a known function of the
text, which the labels are right about but for the flips, and likelihood knows nothing of. docs/real-model.md shows how
the pairs are made. Of the rates 1e-5 and 2e-5 it is that at which DPO alone had the higher greedy gold (0.825 and 0.891
at 20 % flips, seed 10). A run takes half an hour on one core, and 5 GB of memory.
"""

import dataclasses

from sera_jax.studies.plan import Study
from studies.smollm2 import get_config as polite


def get_config() -> Study:
    return dataclasses.replace(
        polite(),
        overrides={
            "data.train": "runs/data/sentiment_pairs.jsonl=0.7",
            "data.eval_fraction": 0.36,
            "data.max_prompt_length": 96,
            "data.max_completion_length": 48,
            "sampling.max_new_tokens": 48,
            "sampling.temperature": 0.7,
            "train.learning_rate": 2e-5,
            "sera.arms": ("daa", "sera", "sera_recommended"),
            "eval.gold": "sentiment",
            "eval.num_prompts": 128,  # all that are held out
            "eval.max_pairs": 64,
            "eval.temperatures": (0.0, 1.0),
        },
        grid={"data.label_noise": (0.4, 0.2)},
        seeds=range(3),
        threads=1,
        processes=0,
    )
