"""The groups of fields, their meanings and their defaults."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelGroup:
    """The base model: a Hugging Face folder, or a shape to train from scratch.

    `sft_model_path` names an SFT checkpoint to start from instead of running SFT. The shape fields are read only when
    `model_name_or_path` is empty. `vocab_size` is then the number of BPE pieces trained from the data, unless
    `tokenizer_name_or_path` brings a tokenizer (0: the tokenizer's own size).

    remat: what the backward pass computes again instead of keeping it: `none`, `dots` (all but the matmuls), `full`
        (all but the input of each layer), or `auto`, the least of these that keeps at most 1 GiB of a row.
    """

    model_name_or_path: str = ""
    sft_model_path: str = ""
    tokenizer_name_or_path: str = ""
    family: str = "llama"
    vocab_size: int = 0
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    logits_dtype: str = "float32"
    remat: str = "auto"
    attn_implementation: str = "xla"


@dataclasses.dataclass(frozen=True)
class DataGroup:
    """Where rows come from and how they become packed rows. Sources are comma-separated, `path=weight` mixes.

    train: preference pairs. eval: held-out pairs (empty: `eval_fraction` of the train prompts, by a stable hash).
        With method="srppo" there are no pairs: train is empty, eval names held-out demonstrations (empty:
        `eval_fraction` of the demonstrations' prompts).
    demonstrations: for SFT (empty: the chosen responses).
    pretrain: prompts and responses for a base model from scratch, which learns the responses (empty: the whole texts of
        the demonstrations, or else of both sides of the pairs).
    prompts: what bootstrapping samples on (empty: the prompts of `train`); new prompts of PPO, see ppo.prompt_overlap.
    """

    train: str = ""
    eval: str = ""
    demonstrations: str = ""
    pretrain: str = ""
    prompts: str = ""
    eval_fraction: float = 0.1
    max_prompt_length: int = 512
    max_completion_length: int = 512
    truncation_mode: str = "keep_end"
    row_tokens: int = 1536
    share_prompt: bool = True
    max_row_shapes: int = 3
    max_bad_fraction: float = 0.05
    label_noise: float = 0.0
    chat_template: str = ""


@dataclasses.dataclass(frozen=True)
class LossGroup:
    """The direct alignment loss. A hyper-parameter left unset takes the loss's own default; one it does not read is
    refused."""

    name: str = "dpo"
    beta: float | None = None
    tau: float | None = None
    delta: float | None = None
    gamma_beta_ratio: float | None = None
    label_smoothing: float | None = None
    nll_coef: float | None = None
    logp_reduction: str | None = None


@dataclasses.dataclass(frozen=True)
class SeraGroup:
    """The rounds of SeRA. One round, or `selection="none"` with `bootstrap_fraction=0`, is the plain DAA.

    arms: what to run from the same SFT model: `sera`, and the controls `daa` (all pairs, as many updates), `random`
    (the same pipeline with random choices of the same size), `selection_only`, `bootstrap_only`.
    keep_fraction: share of the offline pairs kept from round 2 on. threshold (nats) is read by selection="threshold",
        band (two quantiles, in place of a centred keep_fraction) by selection="middle".
    bootstrap_fraction: at most this many sampled pairs, as a share of the offline pairs.
    bootstrap_prompts: prompts sampled for them each round (0: all); num_samples: answers to each.
    min_margin: sampled pairs below this margin (nats) are refused; unset: none is.
    length_alpha: reward per token taken off when candidates are ranked (DICE).
    require_eos: answers that did not end by themselves make no pair.
    ensemble_gamma: weight of the previous round's policy in the reward (SeRA eq. 7).
    reference: `fixed` (the SFT model) or `previous` (the last round's policy; scoring stays with the SFT model).
    """

    rounds: int = 3
    arms: tuple[str, ...] = ("sera",)
    selection: str = "top"
    keep_fraction: float = 0.7
    threshold: float | None = None
    band: tuple[float, float] | None = None
    curriculum: str = "none"
    bootstrap_fraction: float = 0.3
    bootstrap_prompts: int = 0
    num_samples: int = 4
    pairing: str = "best_worst"
    min_margin: float | None = None
    length_alpha: float = 0.0
    require_eos: bool = True
    ensemble_gamma: float = 0.3
    reset_optimizer: bool = False
    reference: str = "fixed"


@dataclasses.dataclass(frozen=True)
class RewardGroup:
    """The coherent reward of Self-Rewarding PPO, log pi_sft - log pi_base, and how it is paid.

    placement: `eos` pays a response's summed log-ratio at its last token (the paper), `token` each token its own. In
        expectation both have the same gradient at gamma = lam = 1, unless length_normalize is set.
    count_eos: whether the end token's own log-ratio counts.
    length_normalize: divide by the response's number of tokens.
    missing_eos: what a response gets that the length limit cut (counted as ppo/missing_eos): `penalty` (no coherent
        reward, and -missing_eos_penalty at its last token), `subtract` (its coherent reward less missing_eos_penalty),
        or `keep` (its coherent reward; the penalty is then not read).
    whiten: divide by the running standard deviation of the scores so far; with placement="eos" their running mean is
        subtracted first.
    clip: what is paid (a score, or a token's share) is cut to [-clip, clip]; unset: it is not.
    """

    placement: str = "eos"
    count_eos: bool = True
    length_normalize: bool = False
    missing_eos: str = "penalty"
    missing_eos_penalty: float = 1.0
    whiten: bool = False
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class PpoGroup:
    """Self-Rewarding PPO: rollouts, advantages and the clipped updates. Optimiser settings are those of `train`, whose
    batch_size is then the number of responses of an iteration (global and exact) and whose save_steps count iterations.

    arms: what to run from the same SFT model: `srppo` itself, and the controls `sft_longer` (sft_longer_factor times
        the SFT updates), `sft_equal_compute` (as many SFT updates as the model passes of `srppo` would pay for),
        `best_of_n` (the SFT model's answer of the largest coherent reward, the plain sum whatever `reward` says,
        among best_of), `random_reward` (normal noise of the coherent reward's mean and variance), `reinforce` (the
        batch mean of the returns in place of the critic).
    iterations: rollout, score, update; eval_iterations: held-out evaluation and a saved policy every so many of them
        (0: at the end only).
    num_samples: responses to each prompt; num_ppo_epochs passes over num_mini_batches parts of an iteration's
        rollouts.
    prompt_overlap: share of each iteration's prompts taken from the SFT demonstrations; the rest are those of
        `data.prompts` that no demonstration has.
    gamma, lam: of GAE. cliprange, cliprange_value: of PPO's losses. whiten_advantages: over an iteration's real
        tokens.
    kl_coef: weight of the KL to the SFT model; kl_in: `reward` (per token) or `loss`; kl_estimator: k1, k2 or k3;
        kl_controller: `fixed`, or `adaptive` towards kl_target nats per response over kl_horizon responses (read
        then).
    critic: `model` (a copy of the SFT model with a zero scalar head) or `head` (a value head on the policy, weighted
        by vf_coef, which only it reads, in a joint loss). critic_learning_rate: unset, that of `train`.
        critic_warmup_iterations: only the critic learns in the first ones (with `head`, only the head); no arm
        updates its policy in them.
    target_kl: once an update's approximate KL to the rollout policy exceeds it, the iteration makes no further update
        of the policy; unset: never. ratio_limit: an update whose mean probability ratio exceeds it is refused and
        counted.
    max_kl: KL to the SFT model, nats per response, at which the run stops.
    max_decode_score_gap: mean absolute difference of the sampler's and the scorer's log-prob of a token, nats, at
        which the run stops.
    """

    arms: tuple[str, ...] = ("srppo", "sft_longer")
    iterations: int = 100
    eval_iterations: int = 0
    num_samples: int = 1
    num_ppo_epochs: int = 1
    num_mini_batches: int = 4
    prompt_overlap: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    whiten_advantages: bool = True
    entropy_coef: float = 0.0
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    kl_controller: str = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    critic: str = "model"
    vf_coef: float = 0.1
    critic_learning_rate: float | None = None
    critic_warmup_iterations: int = 0
    target_kl: float | None = None
    ratio_limit: float = 10.0
    max_kl: float = 200.0
    max_decode_score_gap: float = 0.05
    sft_longer_factor: int = 3
    best_of: int = 8


@dataclasses.dataclass(frozen=True)
class SamplingGroup:
    """How the policy answers prompts, and in how many decode slots."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 1
    slots: int = 64


@dataclasses.dataclass(frozen=True)
class TrainGroup:
    """One optimisation. Used for `pretrain`, `sft` (batches in demonstrations) and `train` (batches in pairs).

    batch_size is global and exact, whatever the accumulation. max_steps > 0 overrides the epochs; for `train` it is the
    number of updates of each round. save_steps=0 saves at the end of each phase only. PPO reads `train` as `ppo` says.

    gradient_accumulation_steps: parts of a batch that are computed one after the other; 0: as few as keep activations
        of at most 1 GiB on each device, or of one row where a row has more.
    logits_chunk_tokens: tokens whose logits are alive at a time on each device, that of `train` in every phase; 0: as
        many as 64 MiB of float32 logits, at most 2048.
    """

    batch_size: int = 64
    gradient_accumulation_steps: int = 0
    num_train_epochs: int = 1
    max_steps: int = 0
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    optim: str = "adamw"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    logits_chunk_tokens: int = 0
    save_steps: int = 200
    save_total_limit: int = 1


@dataclasses.dataclass(frozen=True)
class MeshGroup:
    """Device mesh; -1 takes the devices that remain."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class EvalGroup:
    """Held-out evaluation after every round. 0 pairs or prompts: all there are.

    max_pairs: of held-out pairs, or of held-out demonstrations with method="srppo".
    answer_pattern: a regular expression with one group; the report then shows the share of held-out answers in which it
        is found (`wellformed_fraction`) and, where the rows have responses, the share whose last match is theirs
        (`answer_accuracy`).
    """

    max_pairs: int = 0
    num_prompts: int = 64
    temperature: float = 0.0
    max_new_tokens: int = 0
    num_generations: int = 8
    answer_pattern: str = ""


@dataclasses.dataclass(frozen=True)
class LogGroup:
    """What is written. rollout_iterations: rollouts are saved as text every so many PPO iterations (0: never)."""

    logging_steps: int = 10
    rollout_iterations: int = 10
    tensorboard: bool = True
    report: bool = True
    hf_export: bool = False


@dataclasses.dataclass(frozen=True)
class WorldGroup:
    """The embedded world (sera_jax/world.py); an empty name means real data. Sizes are counts of rows."""

    name: str = ""
    pretrain: int = 8000
    demonstrations: int = 200
    preferences: int = 800
    heldout_preferences: int = 400
    heldout_prompts: int = 200
    heldout_demonstrations: int = 200
    prompts: int = 0
    demonstrator: str = "better"
    cue: float = 0.6


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. method: `sera` (reads `loss` and `sera`) or `srppo`, Self-Rewarding PPO (reads `reward` and `ppo`)."""

    workdir: str = ""
    seed: int = 0
    method: str = "sera"
    model: ModelGroup = ModelGroup()
    data: DataGroup = DataGroup()
    loss: LossGroup = LossGroup()
    sera: SeraGroup = SeraGroup()
    reward: RewardGroup = RewardGroup()
    ppo: PpoGroup = PpoGroup()
    sampling: SamplingGroup = SamplingGroup()
    pretrain: TrainGroup = TrainGroup(learning_rate=1e-3, batch_size=64)
    sft: TrainGroup = TrainGroup(learning_rate=2e-5, batch_size=64)
    train: TrainGroup = TrainGroup()
    mesh: MeshGroup = MeshGroup()
    eval: EvalGroup = EvalGroup()
    log: LogGroup = LogGroup()
    world: WorldGroup = WorldGroup()
