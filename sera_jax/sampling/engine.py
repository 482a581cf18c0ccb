"""The host side of sampling: which sample sits in which slot."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sera_jax import memory
from sera_jax.core import Stream, key_for
from sera_jax.mesh import decoding_mesh, devices_of_a_slice, host_to_global, replicated, row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, abstract_params
from sera_jax.sampling.cache import Cache
from sera_jax.sampling.decode import Placing, Report, SamplerPrograms, form_for, programs
from sera_jax.sampling.params import Draws, Sample, SamplingParams

# Tokens of one prefill call at most, unless one prompt is longer: of many devices together, and of few.
PREFILL_TOKENS_PER_DEVICE, PREFILL_TOKENS = 1024, 2048
WHOLE_BYTES = 2**30  # parameters in the compute dtype of at most this are decoded as a whole copy on each device
COLUMN_STEP = 64  # prompt and cache lengths are rounded up to this, so that few shapes are compiled
ANSWER_BYTES = 400  # what the host holds of an answer at least: a place in the queue, two arrays, their headers
STEPS_PER_CALL = 64  # decode steps between two looks of the host, at most


@dataclasses.dataclass
class Stats:
    """What one call of `generate` did; filled in as it runs."""

    prefilled_prompts: int = 0
    prefill_calls: int = 0
    insert_calls: int = 0
    decode_calls: int = 0
    decode_steps: int = 0
    tokens: int = 0


def generate(
    cfg: ModelConfig,
    params: Params,
    draws: Draws,
    sampling: SamplingParams,
    *,
    slots: int,
    mesh: Mesh | None = None,
    max_prompt_tokens: int | None = None,
    on_progress: Callable[[Sequence[Sample], int, int], None] | None = None,
    stats: Stats | None = None,
    way_out: str = "lower them",
) -> list[Sample]:
    """Draw answers to prompts.

    The tokens of a sample depend on the parameters, its prompt, `sampling` and (seed, round, prompt id, sample index)
    only, not on the other prompts, their order, or the slot it sits in, as long as the shapes are the same: `slots` and
    the cache length, which follows from the longest prompt (or `max_prompt_tokens`, which fixes it for calls with
    different prompts) in steps of 64 tokens.

    Args:
        params: stacked parameters on device, as `init_params` makes them; sharded if `mesh` is given. A second copy of
            them in the compute dtype lives until the call returns.
        slots: samples decoded at a time; split over the mesh's data and fsdp axes if they divide it.
        mesh: that answers are decoded on, such as `mesh_for` makes; the parameters may lie on another of these devices.
        max_prompt_tokens: make room for prompts of this length; default the longest given.
        on_progress: called with (the samples so far, those that ended last at the end; samples in all; new tokens so
            far) after each call of the decoder.
        stats: counts are added to it.
        way_out: what to do where the cache is larger than the devices' memory.

    Returns:
        Samples ordered by prompt, then by sample index.

    Raises:
        OutOfMemory: the cache, or the answers on the host, surely do not fit.
        ValueError: an empty prompt, a prompt that leaves no room in `max_position_embeddings`, ids that do not fit.
    """
    _check(cfg, draws, sampling, slots, max_prompt_tokens)
    if not len(draws.prompts) or not draws.num_samples:
        return []
    stats = Stats() if stats is None else stats
    longest = max(max_prompt_tokens or 0, max(map(len, draws.prompts)))
    check_room(
        cfg,
        sampling.max_new_tokens,
        slots=slots,
        longest=longest,
        devices=mesh.devices.flat if mesh else jax.devices()[:1],
        fields=f"slots={slots} and max_new_tokens={sampling.max_new_tokens}",
        way_out=way_out,
    )
    count = len(draws.prompts)
    check_answers(count * draws.num_samples, f"num_samples={draws.num_samples} to each of {count} prompts")
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        engine = _Engine(
            cfg,
            params,
            draws,
            sampling,
            slots=slots,
            mesh=mesh,
            longest=longest,
            stats=stats,
        )
        total = len(draws.prompts) * draws.num_samples
        samples = list(draws.drawn)
        while len(samples) < total:
            engine.refill()
            samples.extend(engine.decode())
            if on_progress is not None:
                on_progress(samples, total, stats.tokens)
    return sorted(samples, key=lambda sample: (sample.prompt, sample.sample))


class _Engine:
    """The slots of one call of `generate` and the queue of samples that wait for one."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        draws: Draws,
        sampling: SamplingParams,
        *,
        slots: int,
        mesh: Mesh | None,
        longest: int,
        stats: Stats,
    ) -> None:
        self.mesh, self.stats = mesh, stats
        self.prompts = [np.asarray(prompt, np.int32) for prompt in draws.prompts]
        self.prompt_ids = [divmod(prompt_id, 2**32) for prompt_id in draws.ids]  # fold_in takes 32 bits
        self.base_key = self.put(_base_key(draws.seed, draws.round))
        self.prompt_columns = prompt_columns(longest)
        columns = cache_columns(longest, sampling.max_new_tokens)
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        self.programs: SamplerPrograms = programs(cfg, sampling, mesh, slots, form_for(devices))
        prepare, self.run = self.programs.decoder(columns)
        self.prepared = prepare(params)
        self.slots = self.programs.empty(slots, columns)
        self.wake = slots_at_a_time(slots)
        # Prompts prefilled at a time. Not fewer when few are left: another shape could round differently.
        self.block = block_rows(self.prompt_columns, slots, mesh)
        every = ((p, n) for p in range(len(self.prompts)) for n in range(draws.num_samples))
        drawn = {(sample.prompt, sample.sample) for sample in draws.drawn}
        self.queue = collections.deque(place for place in every if place not in drawn)
        self.owner: list[tuple[int, int] | None] = [None] * slots
        self.block_start = -self.block  # first prompt of the block that is prefilled now
        self.block_cache: Cache | None = None

    def put(self, tree: Any) -> Any:
        """Onto the device or, whole, onto the mesh: explicitly, so that it passes a transfer guard."""
        return jax.device_put(tree) if self.mesh is None else host_to_global(tree, replicated(self.mesh))

    def refill(self) -> None:
        """Give idle slots to the samples at the head of the queue."""
        idle = collections.deque(slot for slot, owner in enumerate(self.owner) if owner is None)
        while idle and self.queue:
            if self.queue[0][0] >= self.block_start + self.block:
                self._prefill(self.queue[0][0] // self.block * self.block)  # the same blocks, whatever is drawn already
            places = []
            while idle and self.queue and len(places) < self.wake and self.queue[0][0] < self.block_start + self.block:
                slot, (prompt, sample) = idle.popleft(), self.queue.popleft()
                self.owner[slot] = (prompt, sample)
                tokens = self.prompts[prompt]
                places.append(
                    (slot, prompt - self.block_start, tokens[-1], len(tokens), self.prompt_ids[prompt], sample)
                )
            self._insert(places)

    def _prefill(self, start: int) -> None:
        self.block_start, self.block_cache = start, None  # the old block is freed before the new one is made
        block = self.prompts[start : start + self.block]
        tokens = np.zeros((self.block, self.prompt_columns), np.int32)
        for row, prompt in zip(tokens, block, strict=False):
            row[: len(prompt) - 1] = prompt[:-1]
        self.block_cache = self.programs.prefill(self.prepared, self.put(tokens))
        self.stats.prefill_calls += 1
        self.stats.prefilled_prompts += len(block)

    def _insert(self, places: list[tuple]) -> None:
        unused = (len(self.owner), 0, 0, 1, (0, 0), 0)
        columns = zip(*(places + [unused] * (self.wake - len(places))), strict=True)
        kinds = (np.int32,) * 4 + (np.uint32,) * 2
        placing = Placing(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))
        self.slots = self.programs.insert(self.slots, self.block_cache, self.base_key, self.put(placing))
        self.stats.insert_calls += 1

    def decode(self) -> Iterator[Sample]:
        """Run the decoder once; yields the samples that ended, whose slots are then idle."""
        wake = self.wake if self.queue else len(self.owner)
        bounds = self.put((np.int32(wake), np.int32(STEPS_PER_CALL)))
        self.slots, device_report = self.run(self.prepared, self.slots, *bounds)
        report: Report = jax.device_get(device_report)
        self.stats.decode_calls += 1
        self.stats.decode_steps += int(report.steps)
        for slot, owner in enumerate(self.owner):
            if owner is None or report.active[slot]:
                continue
            self.owner[slot] = None
            count = int(report.count[slot])
            self.stats.tokens += count
            yield Sample(
                prompt=owner[0],
                sample=owner[1],
                tokens=report.tokens[slot, :count].copy(),
                logps=report.logps[slot, :count].copy(),
                finished=bool(report.finished[slot]),
            )


def mesh_for(cfg: ModelConfig, mesh: Mesh, decode_tensor: int = 0) -> Mesh:
    """The mesh that answers are decoded on, of the devices of a training mesh (`mesh.decoding_mesh`).

    Args:
        decode_tensor: devices that share a copy of the parameters. 0: a step reads every weight that lies on its device
            once, so the more of them the faster, but for two sums over them in each layer. Small models lie whole on
            every device, others in as many parts as devices (of a slice) and heads have in common.

    Raises:
        ValueError: `decode_tensor` does not divide the devices, or what is split.
    """
    split = {  # what `mesh.RULES` splits over `tensor`
        "key/value heads": cfg.num_key_value_heads,
        "attention heads": cfg.num_attention_heads,
        "hidden units of the feed-forward": cfg.intermediate_size,
        "ids of the vocabulary": cfg.vocab_size,
    }
    if not decode_tensor:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))
        small = parameters * np.dtype(cfg.dtype).itemsize <= WHOLE_BYTES
        return decoding_mesh(mesh, 1 if small else math.gcd(devices_of_a_slice(mesh), *split.values()))
    for name, size in ({"devices": devices_of_a_slice(mesh)} | split).items():
        if size % decode_tensor:
            raise ValueError(
                f"mesh.decode_tensor={decode_tensor} does not divide the {size} {name}; "
                "choose one that does, or 0 to have it chosen"
            )
    return decoding_mesh(mesh, decode_tensor)


def block_rows(columns: int, slots: int, mesh: Mesh | None) -> int:
    """How many prompts of so many columns are prefilled at a time: as many on each part of the rows of the mesh."""
    devices, shards = (1, 1) if mesh is None else (mesh.size, row_shards(mesh))
    tokens = max(PREFILL_TOKENS, devices * PREFILL_TOKENS_PER_DEVICE)
    block = max(1, min(slots, tokens // columns))
    return _round_up(block, shards) if slots % shards == 0 else block


def slots_at_a_time(slots: int) -> int:
    """Idle slots that are worth interrupting the decoder for: an eighth, so that a sixteenth idles on average."""
    return max(1, slots // 8)


def prompt_columns(longest: int) -> int:
    """Token positions that are prefilled of a prompt, of at most `longest` tokens."""
    return _round_up(max(longest - 1, 1), COLUMN_STEP)


def cache_columns(longest: int, max_new_tokens: int) -> int:
    """Token positions in a slot's cache, for prompts of at most `longest` tokens."""
    return _round_up(max(longest - 1 + max_new_tokens, 1), COLUMN_STEP)


def check_room(
    cfg: ModelConfig,
    max_new_tokens: int,
    *,
    slots: int,
    longest: int,
    devices: Iterable[Any],
    fields: str,
    way_out: str,
) -> None:
    """Raises OutOfMemory where the cache alone is larger than all devices' memory.

    Args:
        longest: tokens of the longest prompt.
        fields, way_out: as in `memory.refuse_beyond`.
    """
    columns = cache_columns(longest, max_new_tokens)
    of_column = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * np.dtype(cfg.dtype).itemsize
    memory.refuse_beyond(
        memory.device_bytes(list(devices)),
        slots * (columns * of_column + 8 * max_new_tokens),
        fields,
        "a decode cache of",
        where="the devices",
        way_out=way_out,
    )


def check_answers(count: int, fields: str) -> None:
    """Raises OutOfMemory where the host cannot hold so many answers at a time; `fields` say whence they come."""
    memory.refuse_beyond(
        memory.host_bytes(),
        count * ANSWER_BYTES,
        fields,
        f"{count} answers at a time, at least",
        where="the host",
        way_out="ask for fewer",
    )


def _base_key(seed: int, round: int) -> np.ndarray:
    """The data of the key from which those of all samples are folded."""
    with jax.transfer_guard_host_to_device("allow"):  # making a key moves its seed
        return np.asarray(jax.random.key_data(key_for(seed, Stream.SAMPLE, round)))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _check(cfg: ModelConfig, draws: Draws, sampling: SamplingParams, slots: int, max_prompt_tokens: int | None) -> None:
    if slots < 1 or draws.num_samples < 0:
        raise ValueError(f"slots={slots} must be at least 1 and num_samples={draws.num_samples} at least 0")
    if len(draws.prompts) != len(draws.ids):
        raise ValueError(f"{len(draws.prompts)} prompts came with {len(draws.ids)} ids; give one integer per prompt")
    if max(sampling.stop_ids) >= cfg.vocab_size:
        raise ValueError(
            f"stop_ids={sampling.stop_ids} holds an id that is not below vocab_size={cfg.vocab_size}; "
            "take the ids from the tokenizer that the model was trained with"
        )
    known = cfg.vocab_size - sum(last - first for first, last in cfg.absent_ids)
    if sampling.min_new_tokens and len(set(sampling.stop_ids)) >= known:
        raise ValueError(
            f"stop_ids name all {known} tokens, so min_new_tokens={sampling.min_new_tokens} leaves no choice; "
            "set min_new_tokens=0"
        )
    room = cfg.max_position_embeddings - sampling.max_new_tokens
    for prompt, prompt_id in zip(draws.prompts, draws.ids, strict=True):
        if not 0 <= prompt_id < 2**64:
            raise ValueError(f"prompt id {prompt_id} must be an integer in [0, 2**64); hash larger ids down to it")
        if len(prompt) == 0:
            raise ValueError(f"prompt {prompt_id} is empty; give it at least one token, such as BOS")
        if len(prompt) > room:
            raise ValueError(
                f"prompt {prompt_id} has {len(prompt)} tokens and max_new_tokens={sampling.max_new_tokens}, together "
                f"more than max_position_embeddings={cfg.max_position_embeddings}; shorten the prompt to "
                f"{max(room, 0)} tokens or lower max_new_tokens"
            )
        if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
            raise ValueError(
                f"prompt {prompt_id} has {len(prompt)} tokens, more than max_prompt_tokens={max_prompt_tokens}; "
                "shorten it or raise the limit"
            )
