"""A state that nothing reads any more is let go of, and the product stays what it was."""

import jax.numpy as jnp
import pytest

from sera_jax.checkpoint import Workdir, retention, save_tree, verify
from sera_jax.checkpoint.retention import check_kept, let_go


def product_in(root, **fields):
    workdir = Workdir(root, {})
    for name, value in fields.items():
        setattr(workdir, name, value)

    def produce(folder):
        for part in ("params", "state"):
            save_tree(folder / part, {"w": jnp.arange(4.0)})

    return workdir, workdir.phase("arm/one", {}, produce)


def sound(root):
    damages = [line for folder in verify.phases(root) for line in verify.damages_of_phase(folder)]
    return damages == [] and list(verify.strays(root)) == []


def test_the_rest_of_a_product_stays_under_its_digest_and_nothing_is_missed(tmp_path):
    workdir, product = product_in(tmp_path)
    for _ in range(2):
        let_go(workdir, product.path, "state")
        assert not (product.path / "state" / "arrays").exists()
        assert (product.path / "params" / "arrays").exists()
        assert product_in(tmp_path)[1] == product
        assert sound(tmp_path)


def test_a_kill_between_the_manifest_and_the_files_is_made_good_by_the_next_start(tmp_path, monkeypatch):
    workdir, product = product_in(tmp_path)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            let_go(workdir, product.path, "state")
    assert (product.path / "state" / "arrays").exists() and not sound(tmp_path)
    workdir, again = product_in(tmp_path)
    let_go(workdir, again.path, "state")
    assert again == product and sound(tmp_path)


def test_what_is_asked_to_keep_all_keeps_all(tmp_path):
    workdir, product = product_in(tmp_path, keeps_states=True)
    let_go(workdir, product.path, "state")
    assert (product.path / "state" / "arrays").exists()
    check_kept(workdir, product.path, "state")


def test_who_needs_it_after_all_is_told_what_to_delete(tmp_path):
    workdir, product = product_in(tmp_path)
    check_kept(workdir, product.path, "state")
    let_go(workdir, product.path, "state")
    with pytest.raises(ValueError, match=rf"no longer has its state.* delete {tmp_path / 'phases' / 'arm'} to make"):
        check_kept(workdir, product.path, "state")
    check_kept(workdir, product.path, "params")
