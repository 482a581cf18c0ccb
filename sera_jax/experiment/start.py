"""The two models that a run starts from: the base, and the SFT model."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from sera_jax import hosts
from sera_jax.checkpoint.papers import file_digest
from sera_jax.config import Config
from sera_jax.experiment.assembly import check_shape
from sera_jax.experiment.brought import named
from sera_jax.experiment.corpus import Corpus
from sera_jax.experiment.folders import folder_identity
from sera_jax.experiment.methods import METHODS
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.loops.sft import sft
from sera_jax.models.folder import is_adapter
from sera_jax.models.lora import merged
from sera_jax.models.parts import merge
from sera_jax.models.peft import target_modules
from sera_jax.models.trained import Trained
from sera_jax.training.parameters import Origin, load_adapters, load_params

START_PHASES = ("world", "tokenizer", "init", "base", "pretrain", "sft")  # what may come before a method's own


def starting_policy(
    config: Config, runtime: Runtime, corpus: Corpus, base_origin: Origin
) -> tuple[Policy | None, Policy]:
    """Base and SFT model: the checkpoints named, or a base from scratch and SFT of it on the demonstrations.

    The base is None where an SFT model is named and the method does not score with its base; an adapter lies over it
    nevertheless.

    Raises:
        ValueError: the two are of different shapes, or, where the base is needed, the same model.
    """
    say, model, needs_base = runtime.writer.announce, config.model, METHODS[config.method].needs_base
    base = None
    if model.sft_model_path:
        check_shape(model, runtime.cfg)
    if _stores_base(config):
        base = _base_policy(config, runtime, corpus, base_origin)
    if model.sft_model_path:
        say(f"SFT model: {model.sft_model_path}; no SFT is run")
        start = _named_sft_model(model.sft_model_path, runtime, base)
    else:
        assert base is not None
        say(f"SFT on {len(corpus.demonstrations)} demonstrations: {corpus.demonstrations_are}")
        start = sft(runtime, "sft", base, corpus.demonstrations, config.sft)
    if needs_base and base is not None:
        _refuse_equal(config, base, start)
    return base if needs_base or not model.sft_model_path else None, start


def phases(config: Config) -> list[str]:
    """The phases of `starting_policy`."""
    of_base = ["base"] if config.model.model_name_or_path else ["init", "pretrain"]
    return [*(of_base if _stores_base(config) else []), "sft"]


def _stores_base(config: Config) -> bool:
    """Whether the base is a phase: the method scores with it, SFT begins with it, or the SFT model is its adapter."""
    sft = config.model.sft_model_path
    return METHODS[config.method].needs_base or not sft or is_adapter(pathlib.Path(sft))


def params_sha256(policy: Policy) -> str:
    """Digest of a policy's parameters, from the checksums stored beside them."""
    return file_digest(policy.path / "params" / "checksums.json")


def _identity_of(folder: str, runtime: Runtime) -> dict[str, Any]:
    record = runtime.workdir.root / "model_folders.json"
    return hosts.on_first(lambda: folder_identity(folder, record, runtime.writer.announce))


def _named_sft_model(path: str, runtime: Runtime, base: Policy | None) -> Policy:
    """The SFT model in a folder: a model; or adapters, which lie over the base where the run trains such, and are else
    merged into it.

    Raises:
        ValueError: the adapters are not of the run's rank, scale or kernels.
    """
    cfg, mesh, identity = runtime.cfg, runtime.mesh, _identity_of(path, runtime)
    if not is_adapter(pathlib.Path(path)):
        return runtime.store("sft", identity, lambda: load_params(cfg, mesh, path))
    assert base is not None
    lora, adapters = load_adapters(cfg, mesh, path)
    identity |= {"base": base.digest}
    if runtime.lora is None:
        scaled = dataclasses.replace(cfg, lora_scale=lora.scale)
        return runtime.store("sft", identity, lambda: merged(scaled, merge(runtime.take(base), adapters)))
    if lora != dataclasses.replace(runtime.lora, dropout=0.0):
        targets = ",".join(target_modules(cfg, lora.kernels))
        raise ValueError(
            f"config.model.sft_model_path={path!r} holds adapters of another kind than those that the run trains; give "
            f"--config.lora.rank={lora.rank} --config.lora.alpha={lora.alpha} --config.lora.use_rslora="
            f"{lora.use_rslora} --config.lora.target_modules={targets} to go on with them, or --config.lora.rank=0 to "
            "merge them into the model and train all of it"
        )
    return runtime.store("sft", identity, lambda: adapters, Trained(lora=runtime.lora), base)


def _base_policy(config: Config, runtime: Runtime, corpus: Corpus, origin: Origin) -> Policy:
    fresh = not config.model.model_name_or_path
    identity = {"model": named(config.model), "seed": config.seed, "tokens": runtime.cfg.vocab_size}
    if not fresh:
        identity |= _identity_of(config.model.model_name_or_path, runtime)
    name = "init" if fresh else "base"
    base = runtime.store(name, identity, lambda: load_params(runtime.cfg, runtime.mesh, origin))
    if not fresh:
        return base
    runtime.writer.announce(f"base model from scratch, on {len(corpus.pretrain)} texts")
    return sft(runtime, "pretrain", base, corpus.pretrain, config.pretrain, adapted=False)


def _refuse_equal(config: Config, base: Policy, start: Policy) -> None:
    if params_sha256(base) != params_sha256(start):
        return
    if config.model.sft_model_path:
        way_out = (
            f"config.model.sft_model_path={config.model.sft_model_path!r} holds the weights of config.model."
            f"model_name_or_path={config.model.model_name_or_path!r}; name the base that the SFT model was trained from"
        )
    else:
        way_out = (
            f"SFT with config.sft.learning_rate={config.sft.learning_rate} and parameters in "
            f"config.model.param_dtype={config.model.param_dtype!r} left every weight as it was; raise the rate"
        )
    raise ValueError(f"the SFT model equals the base: log pi_sft - log pi_base, the reward, is 0 everywhere. {way_out}")
