"""Model folders: what tells them apart; base and SFT model, one tokenizer, two models."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sera_jax import world
from sera_jax.config import ModelGroup
from sera_jax.experiment import folders as folders_module
from sera_jax.experiment.folders import check_two_models, folder_identity


@pytest.fixture
def folders(tmp_path):
    """(base, sft): two folders with the same tokenizer, as paths."""
    base = world.write_tokenizer(tmp_path / "base")
    shutil.copytree(base, tmp_path / "sft")
    return base, tmp_path / "sft"


def check(base, sft, **fields):
    said: list[str] = []
    check_two_models(ModelGroup(model_name_or_path=str(base), sft_model_path=str(sft), **fields), said.append)
    return said


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_two_folders_with_one_tokenizer_are_taken_without_a_word(folders):
    base, sft = folders
    edit(sft / "tokenizer_config.json", lambda config: config.update(chat_template="{{ messages }}", pad_token="<eos>"))
    assert check(base, sft) == []
    assert check("", sft) == check(base, "") == []


def test_one_folder_under_two_names_is_refused_with_what_it_would_mean(folders, tmp_path):
    base, _ = folders
    (tmp_path / "link").symlink_to(base)
    for same in (base, tmp_path / "link", base / ".." / "base"):
        with pytest.raises(ValueError, match=r"the reward, is 0 everywhere; name the base it was trained from"):
            check(base, same)


def test_the_first_token_that_differs_is_named_with_its_ids(folders):
    base, sft = folders

    def exchange(spec):
        vocabulary = spec["model"]["vocab"]
        vocabulary["saw"], vocabulary["axe"] = vocabulary["axe"], vocabulary["saw"]

    edit(sft / "tokenizer.json", exchange)
    ids = {word: world.VOCABULARY.index(word) for word in ("saw", "axe")}
    first, second = sorted(ids, key=lambda word: ids[word])
    says = f"token '{first}' is id {ids[first]} in the base and id {ids[second]} in the SFT model"
    with pytest.raises(ValueError, match=says):
        check(base, sft)
    with pytest.raises(ValueError, match=says):  # a tokenizer that is named cannot mend this
        check(base, sft, tokenizer_name_or_path=str(base))


def test_a_token_that_only_one_has_is_named(folders):
    base, sft = folders
    last = len(world.VOCABULARY)
    edit(sft / "tokenizer.json", lambda spec: spec["model"]["vocab"].update(zebra=last))
    with pytest.raises(ValueError, match=rf"'zebra' is absent in the base and id {last} in the SFT model"):
        check(base, sft)


def test_another_end_token_is_refused_unless_the_tokenizer_to_use_is_named(folders):
    base, sft = folders
    edit(sft / "tokenizer_config.json", lambda config: config.update(eos_token="<assistant>"))
    eos, other = world.VOCABULARY.index("<eos>"), world.VOCABULARY.index("<assistant>")
    says = rf"eos_id is {eos} in the base and {other} in the SFT model.*config\.model\.tokenizer_name_or_path"
    with pytest.raises(ValueError, match=says):
        check(base, sft)
    assert check(base, sft, tokenizer_name_or_path=str(sft)) == []


def test_a_folder_without_a_tokenizer_is_said(folders, tmp_path):
    base, _ = folders
    (tmp_path / "bare").mkdir()
    (said,) = check(base, tmp_path / "bare")
    assert str(tmp_path / "bare") in said


@pytest.fixture
def model(tmp_path):
    """A model folder, and what tells it apart, as a function of it and the work directory's record."""
    rng = np.random.default_rng(0)
    tensors = {f"layer{i}": rng.normal(size=(9, 4)).astype(np.float32) for i in range(3)}
    tensors["norm"] = np.ones(4, ml_dtypes.bfloat16)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model", lambda folder=tmp_path / "model": folder_identity(str(folder), tmp_path / "record.json")


def test_a_model_folder_is_its_tensors_wherever_they_lie_and_however_they_are_cut(model, tmp_path):
    folder, identity = model
    first = identity()
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    names = {name: f"{i}.safetensors" for i, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, tmp_path / "cut" / file)
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert identity(tmp_path / "cut") == first
    assert first["tensors"]["norm"].startswith("BF16 [4] ")
    folder.joinpath("config.json").write_text('{"model_type": "qwen2"}')
    assert identity() != first


@pytest.mark.parametrize("keep_times", [False, True])
def test_other_weights_of_the_same_size_at_the_same_place_are_another_model(model, keep_times):
    folder, identity = model
    first, about = identity(), (folder / "model.safetensors").stat()
    tensors = load_file(folder / "model.safetensors")
    tensors["layer1"][3, 2] = np.nextafter(tensors["layer1"][3, 2], np.float32(9))
    save_file(tensors, folder / "model.safetensors")
    if keep_times:
        os.utime(folder / "model.safetensors", ns=(about.st_atime_ns, about.st_mtime_ns))
    second = identity()
    assert [name for name in first["tensors"] if first["tensors"][name] != second["tensors"][name]] == ["layer1"]


def test_weights_that_nobody_touched_are_read_once(model, monkeypatch):
    _, identity = model
    first = identity()
    monkeypatch.setattr(folders_module, "_tensor_sums", lambda folder: pytest.fail("the weights were read again"))
    assert identity() == first


def test_a_record_that_cannot_be_read_costs_a_reading(model, tmp_path):
    _, identity = model
    first = identity()
    for damage in ("", "[", "[]", json.dumps({str(tmp_path / "model"): 3})):
        (tmp_path / "record.json").write_text(damage)
        assert identity() == first
