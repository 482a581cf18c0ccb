"""`make bench`: the same work by sera_jax and by its peers, in turns (docs/results.md)."""
