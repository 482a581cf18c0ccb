"""What tells one run from another, so that a work directory takes no results for those of another run.

Every field of a config belongs to a run's identity, but those of this table: where results are written, what is said
of them, and how the work is spread over devices. They may change whenever a run is started again. What is in no config
(numbers of processes and devices, paths of caches) is in no identity either.
"""

from typing import Any

FREE: tuple[str, ...] = (
    "workdir",  # the folder may be moved
    "mesh",  # results differ in the order of sums only
    "log",
    "data.benchmarks",  # what is counted of the rows
    "tensor",  # of the command line of sera_jax.evaluate: that of its mesh
)

# Fields that are younger than rows of studies/results/, each with the value at which a run computes what it did before
# there was the field: where it has that value, rows of before are those of the same run.
YOUNGER: dict[str, Any] = {
    "data.columns": "",
    "data.thoughts": "keep",
    "data.pairs": "best_worst",
    "lora.rank": 0,
    "lora.alpha": 32.0,  # read where there is a rank, as the others
    "lora.target_modules": ["all-linear"],
    "lora.use_rslora": False,
    "lora.dropout": 0.0,
    **{f"{group}.trainable": [] for group in ("pretrain", "sft", "train", "reward_model")},
    "model.revision": "",
}

# Fields whose every value computes the same but for the order of sums, as the devices have it, each with the value that
# stands for all of them in digests, older ones included.
ANY_VALUE: dict[str, Any] = {"model.attn_implementation": "xla"}


def known_as(field: str, value: Any) -> Any:
    """The value by which a run's identity knows it."""
    return ANY_VALUE.get(field, value)


def known_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a phase as `known_as` has the fields of their model."""
    model = inputs.get("model")
    if not isinstance(model, dict):
        return inputs
    return inputs | {"model": {name: known_as(f"model.{name}", value) for name, value in model.items()}}


def is_identity(field: str) -> bool:
    """Whether a field, `seed` or `train.batch_size`, belongs to the identity."""
    return field not in FREE and field.split(".")[0] not in FREE


def is_same(field: str, there: Any, now: Any) -> bool:
    """Whether a work directory of the value `there` goes on with the value `now`; None there where it had no field."""
    same = known_as(field, there) == known_as(field, now)
    return same or not is_identity(field) or (there is None and is_as_before(field, now))


def is_as_before(field: str, value: Any) -> bool:
    """Whether a field of `YOUNGER` has the value that makes no difference."""
    return field in YOUNGER and YOUNGER[field] == value
