"""Models of the Hugging Face hub: which files of a repository make a model folder, and which repositories are none."""

from __future__ import annotations

from sera_jax import hub
from sera_jax.hub import TOKENIZER_FILES, Repository, Snapshot
from sera_jax.models.folder import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE, indexed, read_object

SMALL = ("config.json", ADAPTER_CONFIG, INDEX, *TOKENIZER_FILES, ".gitattributes")  # the last is in every repository
_NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


def look(repository: Repository, *, adapters: bool = False) -> Snapshot:
    """A model's commit, with all but its weights in its folder; where `adapters` will do, that of PEFT's, too.

    Raises:
        ValueError: it cannot be had; it has no safetensors, or wants code of its own to be run.
    """
    found = hub.look(repository, SMALL)
    files = sorted(found.sizes)
    if "config.json" not in files:
        adapter = ADAPTER_CONFIG in files
        if adapter and adapters and ADAPTER in files:
            return found
        way_out = f"it holds {hub.some(files)}"
        if adapter:
            way_out = (
                f"it is an adapter: name its base model, and it, with its {ADAPTER}, in config.model.sft_model_path"
            )
        raise ValueError(f"{repository} has no config.json, so it is no model in Hugging Face's format; {way_out}")
    config = read_object(found.folder / "config.json")
    if config.get("auto_map"):
        raise ValueError(
            f"{repository} wants code of its own to be run (trust_remote_code: auto_map={config['auto_map']!r}), which "
            "is never done; name a repository without it, or, where transformers has the "
            f"model_type={config.get('model_type')!r} itself, fetch it by `hf download {repository.id} --local-dir DIR`"
            ", take auto_map out of DIR/config.json and name DIR"
        )
    if SINGLE not in files and INDEX not in files:
        pickles = [name for name in files if name.endswith(_NOT_READ)]
        held = f"only {hub.some(pickles)}" if pickles else hub.some(files)
        raise ValueError(
            f"{repository} has neither {SINGLE} nor {INDEX} ({held}); only safetensors are read, as the others may "
            "hold code or another model: see whether its pull requests have them (NAME@refs/pr/NUMBER), or load it "
            "once with transformers, save it with save_pretrained and name that folder"
        )
    return found


def weights(found: Snapshot) -> list[str]:
    """The files of a model's weights. Raises ValueError where the index names one that the repository has not."""
    if "config.json" not in found.sizes:
        return [ADAPTER]
    if SINGLE in found.sizes:
        return [SINGLE]
    names = indexed(found.folder, f"{found.repository}: {INDEX}")
    if missing := [name for name in names if name not in found.sizes]:
        raise ValueError(
            f"{found.repository}: {INDEX} names files that the repository has not: {hub.some(missing)}; name another "
            "revision"
        )
    return names
