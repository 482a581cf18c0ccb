"""The rules of Self-Rewarding PPO: what its fields must say together."""

from __future__ import annotations

from sera_jax.config import Config
from sera_jax.sampling.engine import check_answers

REWARD_MODEL = "ppo_reward_model"  # the arm that reads preference pairs


def check(config: Config) -> None:
    """Raises ValueError, with the way out, where fields contradict each other."""
    _check_demonstrations(config)
    _check_rollouts(config)
    _check_ppo(config)


def _check_demonstrations(config: Config) -> None:
    """What SRPPO reads: demonstrations, new prompts, and a base that is not the SFT model."""
    data, model, ppo = config.data, config.model, config.ppo
    _check_pairs(config)
    if bool(config.world.name) == bool(data.demonstrations):
        raise ValueError(
            f"config.data.demonstrations={data.demonstrations!r} and config.world.name={config.world.name!r}: "
            "method='srppo' learns from demonstrations; set exactly one of the two"
        )
    if model.sft_model_path and not model.model_name_or_path:
        raise ValueError(
            f"config.model.sft_model_path={model.sft_model_path!r} without config.model.model_name_or_path: the reward "
            "compares the SFT model with the base it was trained from; name that base"
        )
    if config.lora.rank and not config.lora.alpha:
        raise ValueError(
            f"config.lora.rank={config.lora.rank} with config.lora.alpha=0: adapters that change nothing leave the SFT "
            "model equal to the base, and the reward 0 everywhere; give an alpha above 0, or rank=0"
        )
    if controls := [arm for arm in ("sft_longer", "sft_equal_compute") if arm in ppo.arms and model.sft_model_path]:
        raise ValueError(
            f"config.ppo.arms has {', '.join(controls)}, which train SFT from the base by config.sft, but the SFT "
            f"model of config.model.sft_model_path={model.sft_model_path!r} was made otherwise; take them out"
        )
    files = {name: getattr(data, name) for name in ("train", "eval", "prompts", "pretrain")}
    if config.world.name and any(files.values()):
        named = ", ".join(f"config.data.{name}={path!r}" for name, path in files.items() if path)
        raise ValueError(f"{named}: the embedded world writes its own rows; empty them, or empty config.world.name")
    if config.world.name and not config.world.heldout_demonstrations:
        raise ValueError("config.world.heldout_demonstrations=0 leaves nothing to hold out; give at least 1")
    new_prompts = config.world.prompts if config.world.name else data.prompts
    if ppo.prompt_overlap < 1 and not new_prompts:
        field = "world.prompts" if config.world.name else "data.prompts"
        raise ValueError(
            f"config.ppo.prompt_overlap={ppo.prompt_overlap} takes prompts that no demonstration has, but "
            f"config.{field}={new_prompts!r} gives none; name some, or set prompt_overlap=1"
        )


def _check_pairs(config: Config) -> None:
    """Preference pairs are read by the arm with a reward model, and by no other."""
    data, world, arms = config.data, config.world, config.ppo.arms
    if REWARD_MODEL in arms and world.name and not world.preferences:
        raise ValueError(
            f"config.world.preferences=0 leaves the reward model of {REWARD_MODEL} (config.ppo.arms) no pair to learn "
            "from; give some, as many as demonstrations for instance, or take that arm out"
        )
    if REWARD_MODEL in arms and not world.name and not data.train:
        raise ValueError(
            f"config.data.train is empty, but the reward model of {REWARD_MODEL} (config.ppo.arms) learns from "
            "preference pairs; name some: --config.data.train=pairs.jsonl, or take that arm out"
        )
    if REWARD_MODEL not in arms and data.train:
        raise ValueError(
            f"config.data.train={data.train!r} names preference pairs, which method='srppo' reads for the arm "
            f"{REWARD_MODEL} only; empty it and name demonstrations in config.data.demonstrations, or add that arm"
        )
    if REWARD_MODEL not in arms and data.label_noise:
        raise ValueError(
            f"config.data.label_noise={data.label_noise} exchanges the sides of preference pairs, which only the arm "
            f"{REWARD_MODEL} of method='srppo' reads; set it to 0, or add that arm"
        )


def _check_rollouts(config: Config) -> None:
    """What a rollout may be, and that it fits a row."""
    ppo, data, sampling, train = config.ppo, config.data, config.sampling, config.train
    if (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_new_tokens) != (1.0, 1.0, 0, 0):
        raise ValueError(
            f"config.sampling.temperature={sampling.temperature}, top_p={sampling.top_p}, top_k={sampling.top_k}, "
            f"min_new_tokens={sampling.min_new_tokens}: PPO's rollouts must be drawn from the distribution that is "
            "scored; set temperature=1, top_p=1, top_k=0, min_new_tokens=0 (eval.temperature is free)"
        )
    check_answers(train.batch_size, f"config.train.batch_size={train.batch_size}")
    if "best_of_n" in ppo.arms:
        check_answers(ppo.best_of, f"config.ppo.best_of={ppo.best_of}")
    part = ppo.num_samples * ppo.num_mini_batches
    if train.batch_size % part:
        raise ValueError(
            f"config.train.batch_size={train.batch_size} responses an iteration are not a multiple of "
            f"ppo.num_samples={ppo.num_samples} x ppo.num_mini_batches={ppo.num_mini_batches}; use a multiple of {part}"
        )
    prompts = 1 if data.share_prompt else ppo.num_samples
    longest = prompts * data.max_prompt_length + ppo.num_samples * sampling.max_new_tokens
    if longest > data.row_tokens:
        raise ValueError(
            f"config.sampling.max_new_tokens={sampling.max_new_tokens}: a prompt with its {ppo.num_samples} responses "
            f"may have {longest} tokens (config.data.max_prompt_length={data.max_prompt_length}), but "
            f"config.data.row_tokens={data.row_tokens}; raise row_tokens, or lower one of the others"
        )
    answer = config.eval.max_new_tokens or sampling.max_new_tokens
    if data.max_prompt_length + answer > data.row_tokens:
        raise ValueError(
            f"config.eval.max_new_tokens={config.eval.max_new_tokens}: a held-out answer with its prompt may have "
            f"{data.max_prompt_length + answer} tokens, but config.data.row_tokens={data.row_tokens}; raise row_tokens "
            "or lower it"
        )


def _check_ppo(config: Config) -> None:
    """What the updates read."""
    ppo, train = config.ppo, config.train
    if "sft_equal_compute" in ppo.arms and "srppo" not in ppo.arms:
        raise ValueError(
            f"config.ppo.arms={ppo.arms!r}: sft_equal_compute gets what the arm srppo costs; add srppo to the arms"
        )
    for field, value, unset in (("max_steps", train.max_steps, 0), ("num_train_epochs", train.num_train_epochs, 1)):
        if value != unset:
            raise ValueError(
                f"config.train.{field}={value} is not read by method='srppo'; leave it at {unset} and set "
                "config.ppo.iterations, ppo.num_ppo_epochs and ppo.num_mini_batches"
            )
    if ppo.kl_controller == "adaptive" and not ppo.kl_coef:
        raise ValueError(
            "config.ppo.kl_coef=0 stays 0 with kl_controller='adaptive', which multiplies it; give a start"
        )
    if ppo.kl_controller == "adaptive" and 5 * ppo.kl_horizon <= train.batch_size:
        raise ValueError(
            f"config.ppo.kl_horizon={ppo.kl_horizon} with config.train.batch_size={train.batch_size}: one iteration "
            f"could bring the KL coefficient to 0 or below; use a horizon above batch_size / 5 = {train.batch_size / 5}"
        )
    if ppo.critic == "head" and ppo.critic_warmup_iterations and train.weight_decay:
        raise ValueError(
            f"config.train.weight_decay={train.weight_decay} would shrink the policy while its value head warms up "
            f"(ppo.critic='head', ppo.critic_warmup_iterations={ppo.critic_warmup_iterations}); set one of them to 0"
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        raise ValueError(
            "config.ppo.kl_in='loss' with kl_estimator='k1': the expected gradient of k1 as a loss is 0; use k2 or k3, "
            "or kl_in='reward'"
        )
    if ppo.critic == "head" and ppo.critic_learning_rate is not None:
        raise ValueError(
            f"config.ppo.critic_learning_rate={ppo.critic_learning_rate} is read by critic='model' only; a head on the "
            "policy is trained with the policy: unset it, and use ppo.vf_coef"
        )
    if ppo.critic_warmup_iterations >= ppo.iterations:
        raise ValueError(
            f"config.ppo.critic_warmup_iterations={ppo.critic_warmup_iterations} leaves the policy none of "
            f"ppo.iterations={ppo.iterations} to learn in; lower it"
        )
