"""The flags of sera_jax.main within a test, without a command line."""

import types

from absl import flags

from sera_jax import main


def set_flags(monkeypatch, config=None, **given):
    """All of them at their defaults but those given, by name; `config` is what the file of --config would hold."""
    for name, holder in list(vars(main).items()):
        if isinstance(holder, flags.FlagHolder):
            value = config if holder.name == "config" else given.get(holder.name, holder.default)
            monkeypatch.setattr(main, name, types.SimpleNamespace(name=holder.name, value=value))
