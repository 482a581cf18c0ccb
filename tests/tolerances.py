"""How close two ways of computing the same thing must be, one entry per kind of comparison, each with its reason."""

TOLERANCES: dict[str, dict] = {
    "exact": dict(rtol=0.0, atol=0.0, reason="the same program on the same hardware, or integer arithmetic"),
    "closed_form": dict(rtol=1e-5, atol=1e-6, reason="a few float32 operations against float64 numpy"),
    "packing": dict(
        rtol=2e-5,
        atol=2e-4,
        reason="sums over tokens in another order; a response log-prob is a sum of tens of float32",
    ),
    "mesh": dict(rtol=2e-4, atol=2e-4, reason="cross-device sums in another order"),
    "devices": dict(
        rtol=2e-4,
        atol=2e-4,
        reason="a whole run on 1, 2 or 4 devices, in its summary, log and texts: counts, ids and tokens are equal, "
        "floats but for the order of sums; DIFFER_ON_DEVICES may differ",
    ),
    "devices_moved": dict(
        rtol=1e-2,
        atol=0.0,
        reason="what such a run made of each array, in norm: where a gradient is rounding, so is the direction of "
        "Adam's first steps, and single elements end a part of a step apart",
    ),
    "processes": dict(
        rtol=1e-5,
        atol=1e-6,
        reason="losses, and each array of parameters in norm, of a run on as many devices in several processes: sums "
        "over devices in another order; a loss of PPO is a sum of both signs near 0",
    ),
    "microbatch": dict(rtol=1e-4, atol=1e-6, reason="gradients summed in another order, float32"),
    "huggingface_logits": dict(rtol=1e-4, atol=1e-4, reason="float32 matmuls of another library; the issue's bound"),
    "finite_difference": dict(rtol=1e-6, atol=1e-7, reason="central differences in float64, step 1e-6"),
    "trl": dict(rtol=2e-5, atol=2e-5, reason="float32 losses and gradients of TRL on the same log-probs"),
    "decoding": dict(
        rtol=1e-4, atol=5e-5, reason="one query over a cache against whole rows: the same float32 sums in other orders"
    ),
    "decoder_oracle": dict(
        rtol=1e-4, atol=1e-5, reason="a few layers of float32 matmuls of order 1 against float64 numpy"
    ),
    "toy_optimum": dict(
        rtol=0.0,
        atol=1e-4,
        reason="probabilities after a finite ascent in float32 against the exact optimum",
    ),
}

# What depends on the devices in a summary, a line of the log or a row of texts.
DIFFER_ON_DEVICES = {
    "params_sha256": "digests of the parameters' bits",
    "padding_fraction": "the rows of a step are rounded up to a multiple of the devices",
    "rollout/padding_fraction": "as padding_fraction",
    "rewards/accuracies": "before a policy's first update its margins are rounding, and so are their signs",
}
