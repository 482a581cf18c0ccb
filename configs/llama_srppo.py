"""Self-Rewarding PPO on Llama-3-8B shapes: 256 responses of up to 1024 tokens an iteration, rows of 4096.

Demonstrations are those of TULU v2, new prompts those of UltraChat-200k. Name the base on the command line (this one is
gated: accept its licence on the hub, and give HF_TOKEN):

    python -m sera_jax.main --config=configs/llama_srppo.py --config.workdir=runs/llama_srppo \\
        --config.model.model_name_or_path=meta-llama/Meta-Llama-3-8B

SFT is run first; an SFT model of one's own is named in `config.model.sft_model_path`. Without `model_name_or_path` the
same shape starts from scratch, which serves to compile and to measure.

Of the paper (Zhang et al. 2025): the model, the three stages, the reward as a plain sum paid at the end token, GAE with
a critic. Its values could not be obtained: all that stand here, and all defaults, are our choice.

Four models are in memory during PPO, all split over `mesh.fsdp`. Bytes per parameter, with AdamW and float32
parameters: policy 16 (parameters, gradient, two moments), critic 16 (as much, but no vocabulary), SFT model 4, base
4, and, while answers are sampled, 2 for a copy of the policy in bfloat16. For 8 B parameters that is about 330 GB
before activations: 32 chips of 16 GB, 16 of 32 GB or 8 of 80 GB at the least. The cache of 256 answers of 2048 tokens
takes another 69 GB while sampling (`sampling.slots` sets how many are drawn at a time). What makes it less:
`ppo.critic="head"` (a value head on the policy in place of the critic: 16 less) and `train.optim="lion"` (one moment:
4 less for each trained model).

Rows come in multiples of chips x `gradient_accumulation_steps`. A minibatch of 64 answers fills at most 32 rows, and
far fewer where answers are short: on few chips accumulate, on many raise `train.batch_size` with them, or most rows
are filling (`rollout/padding_fraction`). Each evaluation saves a policy and the whole training state, about 190 GB.

Every phase fits 16 chips of v6e, and by adapters 16 of v5e (docs/preflight.md; hours: docs/models.md):

    python -m sera_jax.preflight --config=configs/llama_srppo.py --topology=v6e:4x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.method = "srppo"
    c.workdir = "runs/llama_srppo"

    c.model.vocab_size = 128256
    c.model.hidden_size = 4096
    c.model.intermediate_size = 14336
    c.model.num_hidden_layers = 32
    c.model.num_attention_heads = 32
    c.model.num_key_value_heads = 8
    c.model.head_dim = 128
    c.model.max_position_embeddings = 8192
    c.model.rope_theta = 500000.0
    c.model.tie_word_embeddings = False
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data.demonstrations = "hub:allenai/tulu-v2-sft-mixture"
    c.data.prompts = "hub:HuggingFaceH4/ultrachat_200k:train_gen"
    c.data.chat_template = "hh"  # the base has none of its own
    c.data.row_tokens = 4096
    c.data.row_multiple = 16  # chips of the smallest pod that it is meant for, so that no row is filling
    c.data.max_prompt_length = 1024
    c.data.max_completion_length = 1024

    c.sampling.temperature = 1.0  # rollouts come from the distribution that is scored
    c.sampling.min_new_tokens = 0  # likewise
    c.sampling.max_new_tokens = 1024
    c.sampling.slots = 256

    c.sft.batch_size = 128
    c.sft.gradient_accumulation_steps = 1
    c.sft.learning_rate = 1e-5
    c.sft.num_train_epochs = 2

    c.train.batch_size = 256  # responses of an iteration
    c.train.gradient_accumulation_steps = 1
    c.train.logits_chunk_tokens = 2048  # twice the default of accelerators
    c.train.learning_rate = 1e-6
    c.train.save_steps = 10  # iterations

    c.ppo.arms = ("srppo", "sft_longer", "best_of_n")
    c.ppo.iterations = 200
    c.ppo.eval_iterations = 50  # each saves a policy and the training state
    c.ppo.prompt_overlap = 0.5
    c.ppo.critic_learning_rate = 5e-6
    c.ppo.critic_warmup_iterations = 10

    c.eval.max_pairs = 512
    c.eval.num_prompts = 256
    c.eval.temperature = 1.0

    c.mesh.data = 1
    c.mesh.fsdp = -1  # all devices
    c.mesh.tensor = 1
    return c
