"""SmolLM2-135M-Instruct on pairs of its own answers that a lexicon of sentiment labelled: 8 runs of the plain loss, the
method as published and as recommended.

python -m sera_jax.study --config=studies/smollm2_sentiment.py

The controlled setting of Rafailov et al. (2023, arXiv:2305.18290, section 6.1): the gold is a known function of the
text, which the labels are right about but for the flips, and likelihood knows nothing of. docs/real-model.md shows how
the pairs are made. A run takes half an hour with one core, and 5 GB of memory.
"""

from sera_jax.evaluation.rankings import RANKINGS
from sera_jax.studies.plan import Study


def get_config() -> Study:
    return Study(
        base="configs/smollm2_sera.py",
        overrides={
            "data.train": "runs/data/sentiment_pairs.jsonl=0.7",
            "data.eval_fraction": 0.36,
            "data.max_prompt_length": 96,
            "data.max_completion_length": 48,
            "sampling.max_new_tokens": 48,
            "sampling.temperature": 0.7,
            "train.learning_rate": 5e-5,
            "sera.arms": ("daa", "sera", "sera_recommended"),
            "eval.gold": "sentiment",
            "eval.num_prompts": 64,
            "eval.max_pairs": 64,
            "eval.temperatures": (0.0, 1.0),
        },
        grid={"data.label_noise": (0.2, 0.4)},
        seeds=range(4),
        metrics=(
            "gold_by_temperature/0:gold_by_temperature/*",  # the likeliest answers against DPO at its best temperature
            "gold_mean",
            "kl_to_sft",
            "heldout_accuracy",
            "response_tokens_mean",
            "eos_fraction",
            *(f"round2/{fact}" for fact in ("added", "flipped_fraction_kept", "agreement/agree", "agreement/disagree")),
            *(f"round2/rankings/{name}/gold_gap" for name in RANKINGS),
            *(f"round2/bootstrap/{name}" for name in ("reward_ref_corr", "reward_length_corr", "repeated_ngrams")),
        ),
        baseline="daa",
        panels="data.label_noise",
    )
