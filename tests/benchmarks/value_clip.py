"""How soon a critic reaches its returns under each value clip: `PYTHONPATH=. python tests/benchmarks/value_clip.py`.

A linear critic that starts at 0, on made-up features of 64 answers of 100 tokens an iteration, each paid N(5.2, 4.3) at
its end (GSM8K's numbers); 4 minibatches, gradients cut to norm 1, Adam. Prints V's mean and the clipped share.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sera_jax.losses import advantages, coherent, ppo

WIDTH, ANSWERS, TOKENS, MINI_BATCHES, ITERATIONS = 192, 64, 100, 4, 30
SETTINGS = {"off": (None, True), "0.2 raw": (0.2, False), "0.2": (0.2, True), "0.5": (0.5, True)}
RATES, LAMS, SEEDS, SHOWN = (5e-4, 5e-3), (0.95, 1.0), (0, 1), (5, 10, 20)


def run(clip: float | None, scaled: bool, lam: float, rate: float, seed: int) -> list[tuple[float, float]]:
    """(mean value, clipped share) of every iteration."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(WIDTH)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    follows = jnp.broadcast_to(jnp.arange(TOKENS) < TOKENS - 1, (ANSWERS, TOKENS))

    @jax.jit
    def experience(w, features, paid, moments):
        value = features @ w
        rewards = jnp.zeros((ANSWERS, TOKENS)).at[:, -1].set(paid)
        returns = advantages.gae(rewards=rewards, values=value, follows=follows, gamma=1.0, lam=lam) + value
        return value, returns, coherent.update_moments(moments, returns, jnp.ones(returns.shape, bool))

    @jax.jit
    def update(w, state, features, old_value, returns, scale):
        how = dict(old_value=old_value, returns=returns, cliprange_value=clip, scale=scale)
        gradient = jax.grad(lambda w: ppo.value_loss(value=features @ w, **how).mean())(w)
        change, state = optimizer.update(gradient, state, w)
        return optax.apply_updates(w, change), state, ppo.value_clipped(value=features @ w, **how).mean()

    w, moments, seen = jnp.zeros(WIDTH), coherent.no_moments(), []
    state = optimizer.init(w)
    for _ in range(ITERATIONS):
        features = jnp.float32(0.7 * (common + rng.standard_normal((ANSWERS, TOKENS, WIDTH))))
        paid = jnp.float32(5.2 + 4.3 * rng.standard_normal(ANSWERS))
        value, returns, moments = experience(w, features, paid, moments)
        scale, clipped = moments.rms() if scaled else jnp.float32(1), []
        for part in np.split(rng.permutation(ANSWERS), MINI_BATCHES):
            w, state, share = update(w, state, features[part], value[part], returns[part], scale)
            clipped.append(float(share))
        seen.append((float(value.mean()), float(np.mean(clipped))))
    return seen


if __name__ == "__main__":
    for rate in RATES:
        for lam in LAMS:
            for name, (clip, scaled) in SETTINGS.items():
                runs = np.array([run(clip, scaled, lam, rate, seed) for seed in SEEDS]).mean(0)
                values = ", ".join(f"{runs[k - 1, 0]:.2f}" for k in SHOWN)
                print(f"rate {rate} lam {lam} clip {name}: V {values}; clipped {runs[:10, 1].mean():.2f}")
