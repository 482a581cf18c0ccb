"""How config.json says in what layers differ: windows and rotary embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sera_jax.models.config import ModelConfig
from sera_jax.models.family import Layerwise


def _types(sliding: Iterable[Any]) -> list[str]:
    return ["sliding_attention" if windowed else "full_attention" for windowed in sliding]


def _types_of(cfg: ModelConfig) -> list[str]:
    return _types(cfg.window_of(layer) for layer in range(cfg.num_hidden_layers))


def every_layer(default: int | None) -> Layerwise:
    """The window is that of all layers; `default`: where the field is left out."""
    return Layerwise(
        frozenset({"sliding_window"}),
        lambda config, read: {"sliding_window": config.get("sliding_window", default)},
        lambda cfg: {"sliding_window": cfg.sliding_window},
    )


def _read_switched(config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    types = _types(window is not None and layer >= first for layer in range(read["num_hidden_layers"]))
    return {"sliding_window": window, "layer_types": config.get("layer_types") or types}


def _write_switched(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": cfg.sliding_window is not None,
        "sliding_window": cfg.sliding_window,
        "layer_types": _types_of(cfg),
    }


SWITCHED = Layerwise(  # layers from `max_window_layers` on, or those that `layer_types` names, if `use_sliding_window`
    frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    _read_switched,
    _write_switched,
)


def _read_unturned(config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    every = config.get("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers") or [
        int((layer + 1) % every != 0) for layer in range(read["num_hidden_layers"])
    ]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = _types(window is not None and not turn for turn in turned)
    return {"no_rope_layers": turned, "sliding_window": window, "layer_types": config.get("layer_types") or types}


UNTURNED = Layerwise(  # SmolLM3: every fourth layer is without rotary embeddings, and may have a window
    SWITCHED.fields | {"no_rope_layers", "no_rope_layer_interval"},
    _read_unturned,
    lambda cfg: {
        **_write_switched(cfg),
        "no_rope_layers": list(cfg.no_rope_layers) or [1] * cfg.num_hidden_layers,
    },
)


def alternating(period: int) -> Layerwise:
    """All layers but every `period`-th, unless `layer_types` names them; `sliding_window_pattern` is the period."""

    def read(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        pattern = config.get("sliding_window_pattern") or period
        types = _types((layer + 1) % pattern for layer in range(found["num_hidden_layers"]))
        return {
            "sliding_window": config.get("sliding_window", 4096),
            "layer_types": config.get("layer_types") or types,
        }

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": cfg.sliding_window or 4096, "layer_types": _types_of(cfg)}

    return Layerwise(
        frozenset({"sliding_window", "sliding_window_pattern", "sliding_window_size", "layer_types"}), read, write
    )
