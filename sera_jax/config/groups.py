"""The groups of fields, their meanings, their defaults and what each may be.

What joins fields stands in `rules`, and, for the fields of one method, with that method.
"""

from __future__ import annotations

import dataclasses

from sera_jax.config.fields import above, at_least, one_of, within
from sera_jax.config.lora import LoraGroup
from sera_jax.config.model import ModelGroup
from sera_jax.config.world import WorldGroup


@dataclasses.dataclass(frozen=True)
class DataGroup:
    """Where rows come from and how they become packed rows. Sources are comma-separated, `path=weight` mixes.

    train: preference pairs. eval: held-out pairs (empty: `eval_fraction` of the train prompts, by a stable hash).
        With method="srppo" eval names held-out demonstrations (empty: `eval_fraction` of the demonstrations' prompts),
        and train is empty but for the arm `ppo_reward_model`, whose held-out pairs are those of `eval_fraction` of its
        prompts that no demonstration has. A prompt held out stands in no other source: its rows are left out.
        split_seed names the hash, which is of the prompt's content alone: the same prompts are held out whatever `seed`
        and tokenizer.
    demonstrations: for SFT (empty: the chosen responses).
    pretrain: prompts and responses for a base model from scratch, which learns the responses (empty: the whole texts of
        the demonstrations, or else of both sides of the pairs).
    row_multiple: steps are planned to fill a multiple of so many rows in each microbatch: on a pod the parts that rows
        are spread over (mesh.data x mesh.fsdp). Which pairs make a step depends on it, and so not on the devices.
    add_bos: whether a prompt begins with BOS: as the `tokenizer` does it (where its own chat template writes BOS; with
        plain text or another template, where it puts BOS before text by itself), `always` (once), or `never` (none but
        what the chat template writes). An export begins prompts the same way.
    columns: fields of other names, `prompt:question,system:meta.persona,chosen:answers.0` (NAME:FIELD, FIELD a dotted
        path); `FIELD:` leaves a field out on purpose. A row that has none of them is read by its own form.
    thoughts: <think>...</think> at the start of an answer: `keep` trains on it as generation would write it, `drop`
        leaves it (and fields such as reasoning_content) out, `refuse` counts the row as bad.
    pairs: of a rated or ranked list of answers, `best_worst` takes one pair, `all` every two that are scored apart.
    prompts: what bootstrapping samples on (empty: the prompts of `train`); new prompts of PPO, see ppo.prompt_overlap.
    benchmarks: files of prompts to be answered later (IFEval, GSM8K's test), read by the same forms: how many of them
        stand in rows that are trained on is counted and said, and changes nothing else.
    """

    train: str = ""
    eval: str = ""
    demonstrations: str = ""
    pretrain: str = ""
    prompts: str = ""
    benchmarks: str = ""
    eval_fraction: float = within(0.1, 0, 0.9)
    split_seed: int = at_least(0, 0)
    max_prompt_length: int = at_least(512, 1)
    max_completion_length: int = at_least(512, 1)
    truncation_mode: str = one_of("keep_end", "keep_start", "drop")
    row_tokens: int = at_least(1536, 2)
    share_prompt: bool = True
    row_multiple: int = at_least(1, 1)
    max_row_shapes: int = at_least(3, 1)
    max_bad_fraction: float = within(0.05, 0, 1)
    label_noise: float = within(0.0, 0, 1)
    columns: str = ""
    thoughts: str = one_of("keep", "drop", "refuse")
    pairs: str = one_of("best_worst", "all")
    chat_template: str = ""
    add_bos: str = one_of("tokenizer", "always", "never")


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

    arms: what to run from the same SFT model: `sera` and its controls (docs/methods.md has them all).
    label_smoothing: share of flipped labels that the arms cdpo and robust_dpo are told; unset: data.label_noise, or 0.1
        where that is 0.
    keep_fraction: share of the offline pairs kept from round 2 on. keep_rule: `fraction` reads that; `mixture` keeps
        the share that a fit of two normal distributions to the margins gives the upper one. threshold (nats) is read by
        selection="threshold", band (two quantiles, in place of a centred keep_fraction) by selection="middle".
    replay_fraction: share of the offline pairs left out by the selection of round 2 that is drawn at random and trained
        on all the same; half of it in round 3, a quarter in round 4, and so on.
    curriculum: from round 2 on, offline pairs go from large margins to small (`easy_to_hard`) or back, with the sampled
        pairs, in the order of theirs, spread over them; `none` shuffles.
    bootstrap_fraction: at most this many sampled pairs, as a share of the offline pairs.
    bootstrap_prompts: prompts sampled for them each round (0: all); num_samples: answers to each.
    likelihood_weight: w of what orders a prompt's answers, log pi - (1 - w) log pi_ref: 0 is the loss's own reward (the
        method as published), 1 the likelihood under the policy. ranking_reduction: its `sum` or `mean` over the
        answer's tokens, or as the `loss` does it.
    pairing: of a prompt's answers, the `best_worst` by what ranks, or `all` pairs.
    bootstrap_from: whose answers are paired: the newest `policy`'s, or the `sft` model's, which then judges alone.
    judge: what ranks them: the `policy` by the reward above, or, as controls, `chance`, or the `gold` reward of a run
        that has one; these go without likelihood_weight, ranking_reduction, min_margin, agreement and length_alpha.
    min_margin: sampled pairs below this margin (in the unit of what ranks) are refused; unset: none is.
    bootstrap_band: two quantiles of the sampled pairs' margins; pairs outside are refused, so (0, 0.9) drops the
        largest tenth too. unset: none is.
    support_quantile: an answer makes no pair if its log-prob per token under the SFT model is below this quantile of
        that of the SFT model's own answers (sampled once, one to each prompt, 1000 at most). 0: none is refused.
    agreement: a pair is refused if one of two judges puts it the other way round: `rewards`, the loss's own reward and
        the mean log-prob; `policies`, the newest policy alone and the one before alone (in round 2 the SFT model, whose
        own reward is 0 and refuses nothing). Neither sees length_alpha.
    length_alpha: reward per token taken off when candidates are ranked (DICE).
    require_eos: answers that did not end by themselves make no pair.
    ensemble_gamma: weight of the previous round's policy in the reward (SeRA eq. 7).
    stop_margin_std: no further round begins once the standard deviation of the offline pairs' margins (nats) exceeds
        this (in arms that review them). The round of the highest held-out accuracy so far (without held-out pairs, the
        last) is then the arm's result, marked `kept_as_result`, after fewer updates than the others'. unset: never.
    stop_chosen_logratio: likewise once the mean log pi - log pi_sft of the offline pairs' chosen answers (nats an
        answer) is below minus this.
    stop_kl: likewise, in arms that sample the policy, once the mean log pi - log pi_sft of the candidates (nats an
        answer; the KL to the SFT model where `sampling` is at temperature 1 from the whole distribution) exceeds this.
    stop_unsupported: likewise once the share of candidates that support_quantile refuses exceeds this.
    reset_optimizer: every round begins with a new optimiser and its own learning-rate schedule; else both go on.
    reference: `fixed` (the SFT model) or `previous` (the last round's policy; scoring stays with the SFT model).
    """

    rounds: int = at_least(3, 1)
    arms: tuple[str, ...] = ("sera",)
    label_smoothing: float | None = above(None, 0, 0.49)
    selection: str = one_of("top", "bottom", "middle", "threshold", "random", "none")
    keep_fraction: float = within(0.7, 0, 1)
    keep_rule: str = one_of("fraction", "mixture")
    threshold: float | None = None
    band: tuple[float, float] | None = None
    replay_fraction: float = within(0.0, 0, 1)
    curriculum: str = one_of("none", "easy_to_hard", "hard_to_easy")
    bootstrap_fraction: float = at_least(0.3, 0)
    bootstrap_prompts: int = at_least(0, 0)
    num_samples: int = at_least(4, 2)
    likelihood_weight: float = within(0.0, 0, 1)
    ranking_reduction: str = one_of("loss", "sum", "mean")
    pairing: str = one_of("best_worst", "all")
    bootstrap_from: str = one_of("policy", "sft")
    judge: str = one_of("policy", "chance", "gold")
    min_margin: float | None = None
    bootstrap_band: tuple[float, float] | None = None
    support_quantile: float = within(0.0, 0, 1)
    agreement: str = one_of("none", "rewards", "policies")
    length_alpha: float = 0.0
    require_eos: bool = True
    ensemble_gamma: float = within(0.3, 0, 1)
    reset_optimizer: bool = False
    stop_margin_std: float | None = above(None, 0)
    stop_chosen_logratio: float | None = above(None, 0)
    stop_kl: float | None = above(None, 0)
    stop_unsupported: float | None = above(None, 0, 1)
    reference: str = one_of("fixed", "previous")


@dataclasses.dataclass(frozen=True)
class OnlineGroup:
    """Online DAA: after round 1 on the offline pairs, every update is on pairs that the policy has just made. How they
    are made is `sera`'s: num_samples, likelihood_weight, ranking_reduction, pairing, min_margin, length_alpha,
    require_eos; an update takes `train.batch_size` prompts.

    arms: what to run from the same SFT model: `online_dpo`, and the control `daa` (as many updates on the offline pairs
        again).
    updates: after round 1, on one learning-rate schedule of their own; eval_updates: held-out evaluation and a saved
        policy every so many of them (0: at the end only).
    """

    arms: tuple[str, ...] = ("online_dpo",)
    updates: int = at_least(100, 1)
    eval_updates: int = at_least(0, 0)


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

    placement: str = one_of("eos", "token")
    count_eos: bool = True
    length_normalize: bool = False
    missing_eos: str = one_of("penalty", "subtract", "keep")
    missing_eos_penalty: float = at_least(1.0, 0)
    whiten: bool = False
    clip: float | None = above(None, 0)


@dataclasses.dataclass(frozen=True)
class PpoGroup:
    """Self-Rewarding PPO: rollouts, advantages and the clipped updates. Optimiser settings are those of `train`, whose
    batch_size is then the number of responses of an iteration (global and exact) and whose save_steps count iterations.

    arms: what to run from the same SFT model: `srppo` itself, and the controls `sft_longer` (sft_longer_factor times
        the SFT updates), `sft_equal_compute` (as many SFT updates as the model passes of `srppo` would pay for),
        `best_of_n` (the SFT model's answer of the largest coherent reward, the plain sum whatever `reward` says,
        among best_of), `random_reward` (normal noise of the coherent reward's mean and variance), `reinforce` (the
        batch mean of the returns in place of the critic), `ppo_reward_model` (the score of a reward model that
        `reward_model` trains on the pairs of data.train).
    iterations: rollout, score, update; eval_iterations: held-out evaluation and a saved policy every so many of them
        (0: at the end only).
    num_samples: responses to each prompt; num_ppo_epochs passes over num_mini_batches parts of an iteration's
        rollouts.
    prompt_overlap: share of each iteration's prompts taken from the SFT demonstrations; the rest are those of
        `data.prompts` that no demonstration has.
    gamma, lam: of GAE. cliprange: of the policy loss. whiten_advantages: over an iteration's real tokens.
    value_scale: the unit of the value loss and its clip: `returns` (the root mean square of all tokens' returns so far,
        the iteration's own included) or `none` (that of the reward). cliprange_value: how far a value may move in an
        iteration before its gradient is cut, in that unit; unset: it is never cut.
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
    iterations: int = at_least(100, 1)
    eval_iterations: int = at_least(0, 0)
    num_samples: int = at_least(1, 1)
    num_ppo_epochs: int = at_least(1, 1)
    num_mini_batches: int = at_least(4, 1)
    prompt_overlap: float = within(1.0, 0, 1)
    gamma: float = within(1.0, 0, 1)
    lam: float = within(0.95, 0, 1)
    cliprange: float = above(0.2, 0, 1)
    value_scale: str = one_of("returns", "none")
    cliprange_value: float | None = above(None, 0)
    whiten_advantages: bool = True
    entropy_coef: float = at_least(0.0, 0)
    kl_coef: float = at_least(0.05, 0)
    kl_estimator: str = one_of("k1", "k2", "k3")
    kl_in: str = one_of("reward", "loss")
    kl_controller: str = one_of("fixed", "adaptive")
    kl_target: float = above(6.0, 0)
    kl_horizon: float = at_least(10000.0, 1)
    critic: str = one_of("model", "head")
    vf_coef: float = above(0.1, 0)
    critic_learning_rate: float | None = above(None, 0)
    critic_warmup_iterations: int = at_least(0, 0)
    target_kl: float | None = above(None, 0)
    ratio_limit: float = above(10.0, 1)
    max_kl: float = above(200.0, 0)
    max_decode_score_gap: float = above(0.05, 0)
    sft_longer_factor: int = at_least(3, 2)
    best_of: int = at_least(8, 2)


@dataclasses.dataclass(frozen=True)
class SamplingGroup:
    """How the policy answers prompts, and in how many decode slots."""

    temperature: float = at_least(0.7, 0)
    top_p: float = above(1.0, 0, 1)
    top_k: int = at_least(0, 0)
    max_new_tokens: int = at_least(256, 1)
    min_new_tokens: int = at_least(1, 0)
    slots: int = at_least(64, 1)


@dataclasses.dataclass(frozen=True)
class TrainGroup:
    """One optimisation. Used for `pretrain`, `sft` (batches in demonstrations), `train` and `reward_model` (batches in
    pairs; the latter is read by the arm `ppo_reward_model` of SRPPO alone).

    batch_size is global and exact, whatever the accumulation. max_steps > 0 overrides the epochs; for `train` it is the
    number of updates of each round. save_steps=0 saves at the end of each phase only. PPO reads `train` as `ppo` says.

    gradient_accumulation_steps: parts of a batch that are computed one after the other; 0: as few as keep activations
        of at most 1 GiB on each device, or of one row where a row has more.
    logits_chunk_tokens: tokens whose logits are alive at a time on each device, that of `train` in every phase; 0: as
        many as 128 MiB of float32 logits; on accelerators 512 MiB and at most 2048 tokens.
    master_weights: with model.param_dtype="bfloat16" the optimiser state holds what is trained in float32 as well; the
        updates go there, and the parameters are its rounded values. Without it most updates of a small rate round to
        nothing. Parameters in float32 have no second copy.
    trainable: regular expressions of whole parameter paths, such as `layers/block/.*_norm/scale`; what none matches is
        frozen, and is in no state, checkpoint or saved policy. Empty: everything is trained.
    """

    batch_size: int = at_least(64, 1)
    gradient_accumulation_steps: int = at_least(0, 0)
    num_train_epochs: int = at_least(1, 1)
    max_steps: int = at_least(0, 0)
    learning_rate: float = above(1e-6, 0)
    lr_scheduler_type: str = one_of("cosine", "linear", "constant")
    warmup_ratio: float = within(0.1, 0, 1)
    optim: str = one_of("adamw", "adafactor", "lion")
    weight_decay: float = at_least(0.0, 0)
    adam_beta1: float = within(0.9, 0, 1)
    adam_beta2: float = within(0.999, 0, 1)
    adam_epsilon: float = above(1e-8, 0, 1)
    max_grad_norm: float = above(1.0, 0)
    master_weights: bool = True
    trainable: tuple[str, ...] = ()
    logits_chunk_tokens: int = at_least(0, 0)
    save_steps: int = at_least(200, 0)
    save_total_limit: int = at_least(1, 1)


@dataclasses.dataclass(frozen=True)
class MeshGroup:
    """Device mesh; -1 takes the devices that remain.

    decode_tensor: while answers are drawn, the same devices are a mesh of data and tensor alone, with tensor of this
        size; 0: 1 for models of at most 1 GiB in the compute dtype, else as many as devices and heads share.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    decode_tensor: int = at_least(0, 0)


@dataclasses.dataclass(frozen=True)
class EvalGroup:
    """Held-out evaluation after every round. 0 pairs or prompts: all there are; -1 prompts: none is answered.

    max_pairs: of held-out pairs, or of held-out demonstrations with method="srppo".
    temperature: at which held-out prompts are answered; whatever is reported of answers is of these.
    temperatures: where there is a gold reward, more of them, at which the SFT model and each last policy answer, for
        `gold_by_temperature` and, at 1.0, `kl_to_sft`; each costs one more answer to every prompt and policy.
    num_generations: of the answers at `temperature`, how many of every policy stand in generations.jsonl.
    gold: a gold reward for answers of real rows: `chrf`, likeness to the data's own preferred answer of the prompt
        (needs the package sacrebleu), or `sentiment` (vaderSentiment); empty: none. The embedded world has its own.
    answer_pattern: a regular expression with one group; the report then shows the share of held-out answers in which it
        is found (`wellformed_fraction`) and, where the rows have responses, the share whose last match is theirs
        (`answer_accuracy`).
    """

    max_pairs: int = at_least(0, 0)
    num_prompts: int = at_least(64, -1)
    temperature: float = at_least(0.0, 0)
    temperatures: tuple[float, ...] = ()
    max_new_tokens: int = at_least(0, 0)
    num_generations: int = at_least(8, 0)
    gold: str = one_of("", "chrf", "sentiment")
    answer_pattern: str = ""


@dataclasses.dataclass(frozen=True)
class LogGroup:
    """What is written. rollout_iterations: rollouts are saved as text every so many PPO iterations (0: never).
    keep_states: the state of an optimiser stays also when the phase that goes on from it is finished."""

    logging_steps: int = at_least(10, 1)
    rollout_iterations: int = at_least(10, 0)
    tensorboard: bool = True
    report: bool = True
    hf_export: bool = False
    keep_states: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. method: a name in `experiment.methods.METHODS`, which says the groups that only it reads."""

    workdir: str = ""
    seed: int = within(0, 0, 2**31 - 1)
    method: str = "sera"
    model: ModelGroup = dataclasses.field(default_factory=ModelGroup)
    lora: LoraGroup = dataclasses.field(default_factory=LoraGroup)
    data: DataGroup = DataGroup()
    loss: LossGroup = LossGroup()
    sera: SeraGroup = SeraGroup()
    online: OnlineGroup = OnlineGroup()
    reward: RewardGroup = RewardGroup()
    ppo: PpoGroup = PpoGroup()
    sampling: SamplingGroup = SamplingGroup()
    pretrain: TrainGroup = TrainGroup(learning_rate=1e-3, batch_size=64)
    sft: TrainGroup = TrainGroup(learning_rate=2e-5, batch_size=64)
    train: TrainGroup = TrainGroup()
    reward_model: TrainGroup = TrainGroup(learning_rate=1e-5)
    mesh: MeshGroup = MeshGroup()
    eval: EvalGroup = EvalGroup()
    log: LogGroup = LogGroup()
    world: WorldGroup = dataclasses.field(default_factory=WorldGroup)
