"""tfds builders for preferences and demonstrations: random access on disk, written and read without TensorFlow.

A prompt is stored as text, either itself (`sera_prompt_format` "text") or as the JSON of its messages ("messages"),
and a row's further fields as JSON in `extra`; `sera_jax.data.records` reads both back, so a prepared data set gives the
same records, ids included, as the files it was made from.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from sera_jax.data.records import PREPARED, Record

VERSION = "1.1.0"  # raise it when the same files give other records


class _Records(tfds.core.GeneratorBasedBuilder):
    """One `train` split with the records that `read` yields, in their order.

    Args:
        digest: hash of everything the records are made of; names the directory, so other contents never share one.
        read: returns the records; called only if the directory does not exist yet.
        data_dir: tfds data directory.
    """

    VERSION = tfds.core.Version(VERSION)
    SIDES: tuple[str, ...] = ()
    code_path = None  # where tfds looks for checksums of downloads; there are none, and looking needs more packages

    def __init__(
        self,
        *,
        digest: str,
        read: Callable[[], Iterable[Record]],
        data_dir: pathlib.Path | str,
        **kwargs: Any,
    ):
        self._read = read
        config = tfds.core.BuilderConfig(name=digest, version=self.VERSION, description="one content")
        super().__init__(config=config, data_dir=data_dir, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        fields = ("id", "prompt", PREPARED, *self.SIDES, "extra")
        features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
        # the order of the files is kept: a run must not depend on whether its data were prepared
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(self._read())}

    def _generate_examples(self, records: Iterable[Record]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, record in enumerate(records):
            prompt, kind = record.prompt, "text"
            if not isinstance(prompt, str):
                prompt, kind = json.dumps([dict(turn) for turn in prompt]), "messages"
            yield (
                index,
                {
                    "id": record.id,
                    "prompt": prompt,
                    PREPARED: kind,
                    **{side: getattr(record, side) for side in self.SIDES},
                    "extra": json.dumps(record.extra, default=str),
                },
            )


class SeraPreferences(_Records):
    """Preference records: prompt, chosen, rejected."""

    SIDES = ("chosen", "rejected")


class SeraDemonstrations(_Records):
    """Demonstration records: prompt, response."""

    SIDES = ("response",)


BUILDERS: dict[str, type[_Records]] = {"preference": SeraPreferences, "demonstration": SeraDemonstrations}
