"""The data sets that the papers name, as docs/data.md names them: rows with the exact fields that they have on the hub,
in files that lie as theirs do, are read as what they are."""

import gzip
import pathlib
import re

import pytest

from sera_jax.data.loading import load_records
from tests.data.repository_test import jsonl, parquet

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
(TABLE,) = re.findall(r"^## Data sets of the papers$.*?^## ", PAGE, re.MULTILINE | re.DOTALL)
NAMED = re.findall(r"`--config\.data\.(\w+)=(hub:([\w/-]+)\S*)`", TABLE)
KINDS = {"train": "preference", "eval": "preference", "demonstrations": "demonstration", "prompts": "prompt"}


def said(role, content):
    return {"content": content, "role": role}


ASK, BASIL, SAND = said("user", "Name a herb."), said("assistant", "Basil."), said("assistant", "Sand.")
TALK = [ASK, BASIL, said("user", "Another."), said("assistant", "Sage.")]
PAIR = ((ASK,), "Basil.", "Sand.")

FEEDBACK = {
    "prompt": "Name a herb.", "prompt_id": "0b1", "chosen": [ASK, BASIL], "rejected": [ASK, SAND],
    "messages": [ASK, BASIL], "score_chosen": 8.5, "score_rejected": 2.0,
}  # fmt: skip
HH = {
    "chosen": "\n\nHuman: Name a herb.\n\nAssistant: Basil.",
    "rejected": "\n\nHuman: Name a herb.\n\nAssistant: Sand.",
}
COMPARISON = {
    "info": {"id": "t3_1", "post": "I was given basil.", "title": "A gift", "subreddit": "herbs", "site": None,
             "article": None},
    "summaries": [{"text": " Sand.", "policy": "sup2", "note": None}, {"text": " Basil.", "policy": "ref", "note": ""}],
    "choice": 1, "worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": 7},
}  # fmt: skip
NEWS = COMPARISON | {
    "info": {"id": "c1", "post": None, "title": "Herbs", "subreddit": None, "site": "cnn", "article": "Basil grew."},
    "batch": "cnndm0",
}
POST = "SUBREDDIT: r/herbs\n\nTITLE: A gift\n\nPOST: I was given basil.\n\nTL;DR:"
CHAT = {"prompt": "Name a herb.", "prompt_id": "0b2", "messages": TALK}
TULU = {"dataset": "oasst1", "id": "oasst1_1", "messages": [said("system", "Be brief."), *TALK]}

# Repository (and its branch) -> file -> rows, as they lie there.
HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": {
        "data/train_prefs-00000-of-00001.parquet": [FEEDBACK],
        "data/test_prefs-00000-of-00001.parquet": [FEEDBACK],
        "data/train_sft-00000-of-00001.parquet": [FEEDBACK],
    },
    "Anthropic/hh-rlhf": {
        "helpful-base/train.jsonl.gz": [HH],
        "helpful-base/test.jsonl.gz": [HH],
        "red-team-attempts/red_team_attempts.jsonl.gz": [{"transcript": "\n\nHuman: Hi"}],
    },
    "openai/summarize_from_feedback@refs/convert/parquet": {
        "axis/test/0000.parquet": [{"info": {"id": "t3_1"}, "summary": {"text": " Basil."}}],
        "comparisons/train/0000.parquet": [COMPARISON, NEWS],
        "comparisons/validation/0000.parquet": [COMPARISON],
    },
    "trl-lib/tldr-preference": {
        "data/train-00000-of-00001.parquet": [{"prompt": POST, "chosen": " Basil.", "rejected": " Sand."}],
        "data/validation-00000-of-00001.parquet": [{"prompt": POST, "chosen": " Basil.", "rejected": " Sand."}],
    },
    "trl-lib/tldr": {"data/train-00000-of-00001.parquet": [{"prompt": POST, "completion": " Basil."}]},
    "HuggingFaceH4/ultrachat_200k": {
        "data/train_sft-00000-of-00001-a3ecf92756993583.parquet": [CHAT],
        "data/train_gen-00000-of-00001-a6c9fb894be3e50b.parquet": [CHAT],
        "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet": [CHAT],
    },
    "allenai/tulu-v2-sft-mixture": {"data/train-00000-of-00001-99ee8754042c5cc0.parquet": [TULU]},
}
# Repository -> what its rows are, and which of their fields nobody reads.
READ = {
    "HuggingFaceH4/ultrafeedback_binarized": ([PAIR], {"prompt_id", "messages"}),
    "Anthropic/hh-rlhf": ([PAIR], set()),
    "openai/summarize_from_feedback": (
        [(POST, " Basil.", " Sand."), ("Article:\n\nBasil grew.\n\nTL;DR:", " Basil.", " Sand.")],
        {"worker", "batch", "split", "extra"},
    ),
    "trl-lib/tldr-preference": ([(POST, " Basil.", " Sand.")], set()),
    "trl-lib/tldr": ([(POST, " Basil.")], set()),
    "HuggingFaceH4/ultrachat_200k": ([(tuple(TALK[:3]), "Sage.")], {"prompt_id", "prompt"}),
    "allenai/tulu-v2-sft-mixture": ([((said("system", "Be brief."), *TALK[:3]), "Sage.")], {"dataset"}),
}


def test_the_page_names_every_data_set():
    assert {repository for _, _, repository in NAMED} == READ.keys()


@pytest.mark.parametrize(("field", "spec", "repository"), NAMED)
def test_its_rows_are_read_as_they_come_from_the_hub(field, spec, repository, server):
    name = next(name for name in HUB if name.split("@")[0] == repository)
    files = {
        path: gzip.compress(jsonl(rows)) if path.endswith("gz") else parquet(rows) for path, rows in HUB[name].items()
    }
    commit = server.add(f"datasets/{repository}", {**files, "README.md": b"# Rows\n", ".gitattributes": b"\n"})
    server.repos[f"datasets/{repository}"].revisions = {name.partition("@")[2] or "main": commit}
    records, report = load_records(spec, KINDS[field])
    answers = [answer for answer in ("chosen", "rejected", "response") if hasattr(records[0], answer)]
    expected, unread = READ[repository]
    assert [(record.prompt, *(getattr(record, answer) for answer in answers)) for record in records] == [
        row[: 1 + len(answers)] for row in expected
    ]
    assert {name for record in records for name in record.unread} == unread
    assert not report.dropped
