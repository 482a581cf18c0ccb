"""Policies on disk, for the entries that do not train: a phase of a work directory, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from jax.sharding import Mesh

from sera_jax.checkpoint.papers import file_digest, load_sealed, sealed, write_json
from sera_jax.checkpoint.phases import UNFINISHED
from sera_jax.data.columns import Reading
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.brought import model_folder
from sera_jax.experiment.card import card as card_of
from sera_jax.experiment.ends import GENERATION, end_ids, generation_config, named_ends
from sera_jax.experiment.folders import has_tokenizer
from sera_jax.loops.policy import PART
from sera_jax.models.config import ModelConfig, RopeScaling
from sera_jax.models.decoder import Params
from sera_jax.models.families import config_from_hf
from sera_jax.models.folder import ADAPTER_CONFIG, is_adapter, read_config
from sera_jax.models.huggingface import MAX_SHARD_BYTES, read_source, save_pretrained
from sera_jax.models.lora import Lora
from sera_jax.models.peft import load_adapter, read_adapter_config
from sera_jax.models.trained import ALL, Trained, laid_over
from sera_jax.ops.backends import anywhere
from sera_jax.training.parameters import load_adapters, load_params, load_part

MAX_NEW_TOKENS = 256  # for answers, where neither the user nor a run says
MAX_PROMPT_LENGTH = 1024
_SHOWN = 16  # policies listed in a message


@dataclasses.dataclass(frozen=True)
class SavedPolicy:
    """A policy that was found on disk; nothing but its description is read yet.

    Attributes:
        folder: the phase's, or the Hugging Face folder.
        tokenizer_dir: a folder with its tokenizer, whose chat template is the one it was trained with.
        source: the Hugging Face folder that its config.json and dtypes come from; "" where it has none.
        run: config of the run that trained it, as nested dicts; {} for a Hugging Face folder.
        trained, over: what of it lies in the folder, and the policy that has the rest; None: all does.
    """

    cfg: ModelConfig
    folder: pathlib.Path
    tokenizer_dir: str
    source: str
    run: dict[str, Any]
    trained: Trained = ALL
    over: SavedPolicy | None = None

    @property
    def is_phase(self) -> bool:
        return bool(self.run)

    def of_run(self, field: str, otherwise: Any) -> Any:
        """The value of `group.field` in the run that trained the policy, or `otherwise` where there was none."""
        value: Any = self.run
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return otherwise if value is None else value

    def reading(self, columns: str | None, thoughts: str | None) -> Reading:
        """How rows are read, as given; else as in the run that trained the policy. Raises ValueError for what is no
        reading."""
        return Reading(
            self.of_run("data.columns", "") if columns is None else columns,
            self.of_run("data.thoughts", "keep") if thoughts is None else thoughts,
            self.of_run("data.pairs", "best_worst"),
        )

    def lengths(self, max_new_tokens: int | None, max_prompt_length: int | None) -> tuple[int, int]:
        """(new tokens, prompt tokens) as given; else as in the run that trained the policy; else the defaults above.

        Raises:
            ValueError: together they exceed the model's positions. Only what was not given is lowered to fit.
        """
        room = self.cfg.max_position_embeddings
        new = max_new_tokens or self.of_run("sampling.max_new_tokens", min(MAX_NEW_TOKENS, room // 2))
        most = max_prompt_length or min(self.of_run("data.max_prompt_length", MAX_PROMPT_LENGTH), room - new)
        if most < 1 or most + new > room:
            raise ValueError(
                f"--max_prompt_length={most} and --max_new_tokens={new} exceed the model's "
                f"max_position_embeddings={room} together; lower one of them"
            )
        return new, most

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Every id that ends an answer of the policy, as text of `tokenizer`; for a run's, those that it trained with.

        Raises:
            ValueError: as `ends.named_ends`.
        """
        return end_ids(tokenizer, self.tokenizer_dir, self.source)

    def params(self, mesh: Mesh) -> Params:
        """The parameters, on the mesh; adapters stand beside their kernels (`models.lora.merged`)."""
        if self.over is not None:
            return laid_over(self.part(mesh), self.over.params(mesh))
        return load_params(self.cfg, mesh, self.folder / "params" if self.is_phase else self.folder)

    def part(self, mesh: Mesh) -> Params:
        """Those that lie in the folder of a phase, or the adapters of a folder in PEFT's format."""
        if not self.is_phase:
            return load_adapters(self.cfg, mesh, self.folder)[1]
        return load_part(self.cfg, mesh, self.folder / "params", self.trained)

    @property
    def base(self) -> str:
        """The Hugging Face folder of what it lies over; "" where a run made that."""
        if self.over is not None and not self.is_phase:
            return str(self.over.folder)
        field = {"base": "model.model_name_or_path", "sft": "model.sft_model_path"}
        under = None if self.over is None or self.over.over is not None else self.over.folder.name
        return str(self.of_run(field[under], "")) if under in field else ""

    def card(self) -> str:
        """The model card of a run's policy; "" for a Hugging Face folder."""
        root = _root_of(self.folder) if self.is_phase else None
        return card_of(root, self.folder.absolute()) if root else ""

    def digests(self) -> dict[str, str]:
        """sha256 of the files that say what the parameters are; those of a phase hold a checksum of each array."""
        if self.is_phase:
            files = [self.folder / "params" / "checksums.json"]
        else:
            described = self.folder / ("config.json" if self.over is None else ADAPTER_CONFIG)
            files = [described, *sorted(self.folder.glob("*.safetensors"))]
        under = {f"over/{name}": digest for name, digest in self.over.digests().items()} if self.over else {}
        return {file.name: file_digest(file) for file in files} | under


def describe(root: pathlib.Path, cfg: ModelConfig, tokenizer: Tokenizer, source: str = "", sft: str = "") -> None:
    """Write `model.json` and `tokenizer/`, with which every policy of a work directory can be opened, also elsewhere.

    Args:
        tokenizer: saved with the chat template in force, and beside it what ends an answer.
        source: the Hugging Face folder that the run starts from.
        sft: that of the SFT model, where it is another.
    """
    (root / "model.json").unlink(missing_ok=True)  # first and last: it vouches for what is written in between
    shutil.rmtree(root / "tokenizer", ignore_errors=True)
    tokenizer.save(root / "tokenizer")
    generation = generation_config(end_ids(tokenizer, sft, source), sft, source)
    write_json(root / "tokenizer" / GENERATION, generation)
    described = {
        "model": dataclasses.asdict(cfg),
        "source": os.path.abspath(source) if source else "",
        "files": {str(path.relative_to(root)): file_digest(path) for path in _describing(root)},
    }
    write_json(root / "model.json", sealed(described))


def load_description(root: pathlib.Path) -> dict[str, Any]:
    """`model.json`, of a work directory whose tokenizer and config.json are those that it was written with.

    Raises:
        ValueError: one of them is missing, cannot be read, or is not what was written.
    """
    way_out = "start the run's command again, which writes it"
    described = load_sealed(root / "model.json", way_out, "model", "source", "files")
    for name, digest in described["files"].items():
        if not (root / name).is_file():
            raise ValueError(f"{root / name} is missing; {way_out}")
        if file_digest(root / name) != digest:
            raise ValueError(f"{root / name} is not what was written; {way_out}")
    return described


def _describing(root: pathlib.Path) -> list[pathlib.Path]:
    """The files without which a policy is not what it was when it was trained."""
    return [path for path in (root / "config.json", *sorted((root / "tokenizer").rglob("*"))) if path.is_file()]


def find_policy(path: str | os.PathLike, *, dtype: str = "", param_dtype: str = "float32") -> SavedPolicy:
    """The policy at a path.

    Args:
        path: `WORKDIR/phases/NAME` (for instance runs/quickstart/phases/sera/round3), a Hugging Face folder, of a
            model or of PEFT's adapters, or `org/name[@revision]` of the hub, which is fetched.
        dtype: compute dtype; "" for that of the run, and float32 for a Hugging Face folder.
        param_dtype: dtype of the parameters of a Hugging Face folder; a run's are as it trained them.

    Raises:
        ValueError: neither is there; the message lists the policies nearby.
    """
    folder = pathlib.Path(model_folder(str(path)))
    if (folder / "params" / "checksums.json").is_file():
        if (folder / UNFINISHED).exists():
            raise ValueError(
                f"{folder}: its arrays are being written; wait for that, or, where its run was killed, start the run's "
                "command again"
            )
        root = _root_of(folder)
        if root is None:
            raise ValueError(f"no model.json above {folder}; open a policy where its run wrote it")
        saved = load_description(root)
        cfg = _model_config(saved["model"])
        cfg = dataclasses.replace(cfg, dtype=dtype) if dtype else cfg
        source = saved["source"] if pathlib.Path(saved["source"]).is_dir() else ""
        run = json.loads((root / "config.json").read_text(encoding="utf-8"))
        return _phase(SavedPolicy(cfg, folder, str(root / "tokenizer"), source, run), root)
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
        cfg = config_from_hf(read_config(folder), dtype=dtype or "float32", param_dtype=param_dtype)
        return SavedPolicy(cfg, folder, str(folder), str(folder), {})
    if is_adapter(folder):
        return _adapter(folder, dtype, param_dtype)
    found = _policies_near(folder)
    hint = f". Policies there: {', '.join(found[:_SHOWN])}{' ...' if len(found) > _SHOWN else ''}" if found else ""
    raise ValueError(
        f"{folder} {'is no policy' if folder.exists() else 'does not exist'}; give one of a work directory "
        f"(WORKDIR/phases/NAME) or a Hugging Face folder (config.json and *.safetensors){hint}"
    )


def _adapter(folder: pathlib.Path, dtype: str, param_dtype: str) -> SavedPolicy:
    """The adapters of a folder in PEFT's format, over the model that it says they were trained from."""
    name = read_adapter_config(folder).get("base_model_name_or_path")
    try:
        base = find_policy(name or "", dtype=dtype, param_dtype=param_dtype)
    except ValueError as error:
        raise ValueError(
            f"{folder} is an adapter of base_model_name_or_path={name!r}, which cannot be opened: {error}; fetch that "
            f"model and put its folder into {folder / ADAPTER_CONFIG}"
        ) from error
    lora, _ = load_adapter(folder, base.cfg)
    return dataclasses.replace(
        base,
        cfg=dataclasses.replace(base.cfg, lora_scale=lora.scale),
        folder=folder,
        tokenizer_dir=str(folder) if has_tokenizer(str(folder)) else base.tokenizer_dir,
        trained=Trained(lora=lora),
        over=base,
    )


def _phase(saved: SavedPolicy, root: pathlib.Path) -> SavedPolicy:
    """The policy, with what it lies over in its work directory."""
    file = saved.folder / PART
    if not file.is_file():
        return saved
    found = json.loads(file.read_text(encoding="utf-8"))
    lora = found["lora"] and Lora(**found["lora"] | {"kernels": tuple(found["lora"]["kernels"])})
    under = root / "phases" / found["over"]
    if not (under / "params" / "checksums.json").is_file():
        raise ValueError(f"{saved.folder} is a part of a model over that of {under}, which is not there; put it back")
    trained = Trained(tuple(found["patterns"]), lora)
    over = _phase(dataclasses.replace(saved, folder=under), root)
    return dataclasses.replace(saved, trained=trained, over=over)


def export(
    params: Params,
    cfg: ModelConfig,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    source: str | os.PathLike | None = None,
    tokenizer_dir: str | os.PathLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    card: str = "",
) -> pathlib.Path:
    """Write `out` as a Hugging Face folder: weights, config.json, generation_config.json, tokenizer files.

    Its generation_config.json is that of `tokenizer_dir`, else that of the source, with every id that ends an answer.

    Args:
        dtype: dtype of the weights; default that of the weights the model was loaded from (`cfg.export_dtype`).
        source: the Hugging Face folder that the model was loaded from, if at hand: its config.json is kept, and the
            tensors get its names and dtypes one by one.
        tokenizer_dir: folder whose tokenizer files are copied.
        overwrite: replace an existing folder.
        card: text of its README.md; "" for none.

    Raises:
        ValueError, FileExistsError: as `huggingface.save_pretrained`; ValueError as `ends.named_ends`.
    """
    described = read_source(source) if source else None
    ends = _ends_of_folders(tokenizer_dir or "", source or "")
    written = save_pretrained(
        out,
        cfg,
        params,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_dir=tokenizer_dir,
        source_config=described and described.config,
        source_dtypes=described and described.dtypes,
        generation=generation_config(ends, tokenizer_dir or "", source or "") if ends else None,
        overwrite=overwrite,
    )
    if card:
        (written / "README.md").write_text(card, encoding="utf-8")
    return written


def _ends_of_folders(tokenizer_dir: str | os.PathLike, source: str | os.PathLike) -> tuple[int, ...]:
    """What ends an answer, by a folder's tokenizer and what is named there and in the source."""
    try:
        if has_tokenizer(str(tokenizer_dir)):
            return end_ids(Tokenizer.load(tokenizer_dir), tokenizer_dir, source)
    except ValueError:  # a tokenizer that we cannot use, for instance without any end, may be exported nevertheless
        pass
    return tuple(sorted(named_ends(tokenizer_dir, source)))


def _policies_near(folder: pathlib.Path) -> list[str]:
    """Policies below the folder, or below what exists of its path if that lies in a work directory; oldest first."""
    if not folder.exists():
        folder = next((parent for parent in folder.parents if parent.exists()), folder)
        if _root_of(folder) is None:
            return []
    found = folder.rglob("params/checksums.json")
    files = [file for file in found if (file.parent.parent / "manifest.json").exists() and ".partial" not in str(file)]
    files.sort(key=lambda file: (file.stat().st_mtime, str(file)))
    return [str(file.parent.parent) for file in files]


def _root_of(folder: pathlib.Path) -> pathlib.Path | None:
    """The work directory that the folder is, or lies in."""
    here = folder.absolute()
    return next((path for path in (here, *here.parents) if (path / "model.json").is_file()), None)


def _model_config(fields: dict[str, Any]) -> ModelConfig:
    """That of a run, for whatever devices are here."""
    scaling = fields["rope_scaling"]
    here = {"attn_implementation": anywhere(fields["attn_implementation"])}
    return ModelConfig(**fields | here | {"rope_scaling": RopeScaling(**scaling) if scaling else None})
