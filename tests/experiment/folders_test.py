"""Base and SFT model given as folders: one tokenizer, two models."""

import json
import shutil

import pytest

from sera_jax import world
from sera_jax.config import ModelGroup
from sera_jax.experiment.folders import check_two_models


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
