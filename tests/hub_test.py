"""The downloader, against a small hub on this machine."""

import os
import pathlib

import pytest

from sera_jax import hub

SMALL = ("config.json", ".gitattributes")
FILES = {"config.json": b"{}", "a.safetensors": bytes(range(256)) * 400, "b/c.txt": b"text", ".gitattributes": b"\n"}


def refusal(name, kind="model", small=SMALL):
    with pytest.raises(ValueError) as caught:
        hub.look(hub.parse(name, kind, bare=True), small)
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


def test_a_name_is_a_repository_unless_it_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.parse("org/name") == hub.Repository("org/name")
    assert hub.parse("org/name@refs/pr/1", "dataset") == hub.Repository("org/name", "refs/pr/1", "dataset")
    for path in ("absent", "/a/b", "./a", "../a/b", "~/a", "a/b/c", "", "a/"):
        assert hub.parse(path) is None, path
    assert hub.parse("gpt2", bare=True) == hub.Repository("gpt2")
    pathlib.Path("org/name").mkdir(parents=True)
    assert hub.parse("org/name") is None, "a local folder of that name wins"


def test_a_branch_becomes_a_commit_and_only_what_is_wanted_is_fetched(server):
    commit = server.add("models/org/name", FILES)
    said = []
    snapshot = hub.look(hub.Repository("org/name"), SMALL)
    assert snapshot.commit == commit
    assert snapshot.sizes == {name: len(content) for name, content in FILES.items()}
    (path,) = hub.fetch(snapshot, ["b/c.txt"], said.append)
    assert pathlib.Path(path).read_bytes() == b"text"
    assert "org/name" in said[0]
    assert sorted(server.files_sent()) == [".gitattributes", "b/c.txt", "config.json"]
    assert hub.name_of(str(snapshot.folder)) == f"org/name@{commit}"
    assert hub.name_of("models/mine") == "models/mine"


def test_what_lies_in_the_cache_is_asked_for_by_its_commit_without_a_request(server):
    commit = server.add("models/org/name", FILES)
    hub.fetch(hub.look(hub.Repository("org/name"), SMALL), list(FILES))
    server.add("models/org/name", {**FILES, "config.json": b'{"newer": 1}'})
    del server.asked[:]
    snapshot = hub.look(hub.Repository("org/name", commit), SMALL)
    said = []
    hub.fetch(snapshot, list(FILES), said.append)
    assert (server.asked, said) == ([], [])
    assert (snapshot.folder / "config.json").read_bytes() == b"{}", "of that commit, not of the branch now"
    assert hub.look(hub.Repository("org/name"), SMALL).commit != commit, "the branch has moved"


def test_the_cache_serves_without_a_network_and_says_what_it_lacks(server, monkeypatch):
    from huggingface_hub import constants

    commit = server.add("models/org/name", FILES)
    hub.look(hub.Repository("org/name"), SMALL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = hub.look(hub.Repository("org/name"), SMALL)
    assert snapshot.commit == commit
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set; bring it: `hf download org/name .*--local-dir"):
        hub.fetch(snapshot, ["a.safetensors"])
    assert "HF_HUB_OFFLINE" in refusal("org/other")
    assert "--repo-type dataset --revision v1" in refusal("org/rows@v1", "dataset")


def test_a_cut_transfer_goes_on_where_it_was(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # what is whole of it is kept
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server.add("models/org/name", FILES)
    snapshot = hub.look(hub.Repository("org/name"), SMALL)
    server.cuts = 2
    (path,) = hub.fetch(snapshot, ["a.safetensors"])
    assert pathlib.Path(path).read_bytes() == FILES["a.safetensors"]
    begun = [span for method, path, span in server.asked if method == "GET" and path.endswith("a.safetensors")]
    assert begun == ["", "bytes=50000-", "bytes=70000-"], "each cut comes in the middle of what was left"


def test_a_transfer_that_stays_cut_is_told_and_what_is_whole_is_kept(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server.add("models/org/name", FILES)
    snapshot = hub.look(hub.Repository("org/name"), SMALL)
    hub.fetch(snapshot, ["b/c.txt"])
    server.cuts = 1000
    with pytest.raises(ValueError, match=r"transfer of org/name was cut .* start again: files that are whole are kept"):
        hub.fetch(snapshot, ["b/c.txt", "a.safetensors"])
    assert not (snapshot.folder / "a.safetensors").exists(), "half a file has no name"
    server.cuts = 0
    hub.fetch(snapshot, ["b/c.txt", "a.safetensors"])
    assert server.files_sent().count("b/c.txt") == 1


def test_a_name_a_revision_and_a_right_that_are_missing_are_told_apart(server, monkeypatch):
    server.add("models/org/name", FILES)
    server.add("models/org/gated", FILES, gated=True)
    server.add("models/org/private", FILES, token="theirs")
    assert "401 to org/absent" in refusal("org/absent")
    assert "set HF_TOKEN" in refusal("org/private")
    assert "no revision 'v7'; its branches and tags: main" in refusal("org/name@v7")
    gated = refusal("org/gated")
    assert "gated; accept its terms at" in gated
    assert "set HF_TOKEN" in gated
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert "neither a path here nor a model of the hub" in refusal("org/absent")
    assert "HF_TOKEN is of an account that may not read it" in refusal("org/gated")
    monkeypatch.setenv("HF_TOKEN", "theirs")
    assert hub.look(hub.Repository("org/private"), SMALL).sizes
    assert "is no name of a repository" in refusal("a--b/c")


def test_a_hub_that_fails_or_is_not_there_is_told(server, monkeypatch):
    from huggingface_hub import constants

    server.down = 503
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert "answers 503 to org/name" in refusal("org/name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    text = refusal("org/name")
    assert "cannot be reached" in text
    assert "`hf download org/name --local-dir DIR`" in text


def test_a_full_disk_is_told_before_and_while_it_fills(server, monkeypatch):
    server.add("models/org/name", FILES)
    snapshot = hub.look(hub.Repository("org/name"), SMALL)
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match=r"disk of .*cache is full; 0.1 MB are wanted, or set HF_HOME"):
            hub.fetch(snapshot, ["a.safetensors"])

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(ValueError, match="is full; make room, or set HF_HOME"):
        hub.fetch(snapshot, ["a.safetensors"])


def test_a_cache_that_lists_nothing_is_read_as_it_lies(server, monkeypatch):
    from huggingface_hub import errors

    server.add("models/org/name", FILES)
    hub.look(hub.Repository("org/name"), SMALL)

    def unlisted(*_, **__):
        raise errors.CachedRepoTreeNotFoundError

    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", unlisted)
    assert set(hub.look(hub.Repository("org/name"), SMALL).sizes) == set(SMALL)
