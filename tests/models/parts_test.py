"""A tree of parameters is divided by the names of its leaves and put together again without loss."""

import jax
import numpy as np
import pytest

from sera_jax.models.parts import merge, split

TREE = {
    "embed": np.zeros(2),
    "layers": {"block": {"q": {"kernel": np.ones(3)}, "norm": {"scale": np.ones(1)}}},
    "value_head": np.ones(4),
}
PATTERNS = ["value_head", "layers/.*", r".*/kernel", "embed|value_head", ".*", "none of them"]


def paths(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_parts_together_are_the_tree_and_share_no_leaf(pattern):
    matching, rest = split(TREE, pattern)
    assert paths(matching) | paths(rest) == paths(TREE)
    assert not paths(matching) & paths(rest)
    whole = merge(matching, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(TREE)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(TREE), strict=True)), "no copy"


def test_a_pattern_is_of_the_whole_path():
    assert paths(split(TREE, "layers/block/q/kernel")[0]) == {"layers/block/q/kernel"}
    assert split(TREE, "kernel")[0] == split(TREE, "layers")[0] == {}
    assert split(TREE, ".*/scale")[1]["layers"]["block"].keys() == {"q"}, "a dict left empty is dropped"


def test_a_leaf_of_both_trees_is_refused_by_name():
    with pytest.raises(ValueError, match="'scale' stands in both trees"):
        merge(TREE, {"layers": {"block": {"norm": {"scale": np.ones(1)}}}})
