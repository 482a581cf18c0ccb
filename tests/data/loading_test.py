"""Loading: every row is kept or accounted for, tokens keep their limits, choices are reproducible."""

import gzip
import json
import time

import numpy as np
import pytest

from sera_jax.data import loading
from sera_jax.data.items import Item, PairItem, content_key, openings_of, stable_id
from sera_jax.data.loading import Limits, TooManyBadRows, flip_labels, load_preferences, split_heldout
from sera_jax.data.records import parse_demonstration, parse_preference, parse_prompt

BOS, EOS, OFFSET = 1, 2, 3
WIDE = Limits(max_prompt_length=4096, max_completion_length=4096, row_tokens=16384)


class Bytes:
    """A tokenizer whose tokens are the bytes of the text; it refuses prompts with a NUL."""

    bos_id, end_id = BOS, EOS

    def encode_prompts(self, prompts, refused=None):
        texts = [p if isinstance(p, str) else "|".join(f"{t['role']}:{t['content']}" for t in p) for p in prompts]
        if refused is not None:
            refused.update({i: "the template refuses NUL" for i, text in enumerate(texts) if "\0" in text})
        return [np.array([BOS, *(b + OFFSET for b in text.encode())], np.int32) for text in texts]

    def encode_responses(self, prompts, texts, complete=True, refused=None):
        return [np.array([*(b + OFFSET for b in t.encode()), *[EOS] * complete], np.int32) for t in texts]

    def encode_texts(self, texts):
        return [np.array([BOS, *(b + OFFSET for b in text.encode()), EOS], np.int32) for text in texts]

    def decode(self, ids):
        return bytes(int(i) - OFFSET for i in ids if i >= OFFSET).decode(errors="replace")


def row(number, **changes):
    return {"prompt": f"prompt {number}", "chosen": f"yes {number}", "rejected": f"no {number}", **changes}


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(spec, limits=WIDE, **options):
    return load_preferences(str(spec), Bytes(), limits=limits, **options)


def ids(pairs):
    return [pair.item.id for pair in pairs]


def texts(item):
    return [Bytes().decode(part) for part in (item.prompt, *item.responses)]


def test_items_hold_the_tokens_of_the_record(tmp_path):
    pairs, report = load(write(tmp_path / "a.jsonl", [row(1), row(2)]))
    assert [texts(pair.item) for pair in pairs] == [["prompt 1", "yes 1", "no 1"], ["prompt 2", "yes 2", "no 2"]]
    for pair in pairs:
        assert pair.pairs == ((0, 1),)
        assert not pair.flipped
        assert pair.item.prompt[0] == BOS
        assert all(response[-1] == EOS and response.dtype == np.int32 for response in pair.item.responses)
    assert (report.rows, report.kept, report.bad_rows) == (2, 2, 0)


def test_demonstrations_have_one_response_and_prompts_none(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    (item,), _ = loading.load_demonstrations(path, Bytes(), limits=WIDE)
    assert texts(item) == ["p", "r"]
    (item,), report = loading.load_prompts(path, Bytes(), limits=WIDE)
    assert texts(item) == ["p"]
    assert report.kept == 1
    (record,), _ = loading.load_records(path, "demonstration")
    assert record == parse_demonstration({"prompt": "p", "response": "r"})


def test_every_row_is_kept_or_counted_with_its_first_place(tmp_path):
    bad = ["{", "[]", row(1, chosen=None), row(2, rejected="yes 2"), row(3, prompt="\0"), row(4, prompt=5), "{"]
    path = write(tmp_path / "a.jsonl", [*(row(i) for i in range(10, 30)), *bad, "", row(9, chosen="\ufffd")])
    pairs, report = load(path, max_bad_fraction=0.5, workdir=tmp_path, name="train")
    counts = {reason: (count.count, count.first) for reason, count in report.bad.items()}
    assert counts == {
        "invalid_json": (2, f"{path}:21"),
        "not_an_object": (1, f"{path}:22"),
        "missing_field": (1, f"{path}:23"),
        "identical_pair": (1, f"{path}:24"),
        "wrong_type": (1, f"{path}:26"),
        "template_refused": (1, f"{path}:25"),
    }
    assert {note: count.count for note, count in report.noted.items()} == {"blank_line": 1, "replacement_char": 1}
    assert report.rows == 28 == report.kept + report.bad_rows
    assert len(pairs) == report.kept == 21
    written = json.loads((tmp_path / "data" / "train.json").read_text())
    assert written["bad"]["invalid_json"] == {
        "count": 2,
        "first": f"{path}:21",
        "detail": report.bad["invalid_json"].detail,
    }
    assert all(reason in report.table() for reason in (*counts, "blank_line", f"{path}:21"))


def test_more_bad_rows_than_allowed_stop_the_run_and_show_the_report(tmp_path):
    path = write(tmp_path / "a.jsonl", [*(row(i) for i in range(19)), "{"])
    assert load(path)[1].bad_fraction == 0.05
    with pytest.raises(TooManyBadRows, match=r"(?s)1 of 20 rows are bad, more than 4 %.*invalid_json.*a\.jsonl:20"):
        load(path, max_bad_fraction=0.04, workdir=tmp_path, name="eval")
    assert (tmp_path / "data" / "eval.json").exists()


def test_a_source_with_nothing_usable_stops_the_run_whatever_the_others_hold(tmp_path):
    good = write(tmp_path / "good.jsonl", [row(i) for i in range(100)])
    empty = write(tmp_path / "bad.jsonl", ["{"])
    with pytest.raises(TooManyBadRows, match=r"nothing usable in .*bad\.jsonl"):
        load(f"{good},{empty}")


def test_a_damaged_file_stops_the_run_even_below_the_allowed_fraction(tmp_path, shared_data):
    good = write(tmp_path / "good.jsonl", [row(i) for i in range(100)])
    for name in ("git_lfs_pointer.jsonl", "git_lfs_pointer.jsonl.gz"):
        with pytest.raises(TooManyBadRows, match=f"(?s){name}:1: a git-LFS pointer.*git lfs pull"):
            load(f"{good},{shared_data / 'badrows' / name}")
    cut = tmp_path / "cut.jsonl.gz"
    noise = np.random.default_rng(0).integers(0, 2**60, size=9000)
    cut.write_bytes(gzip.compress("\n".join(json.dumps(row(int(i))) for i in noise).encode())[:-100])
    with pytest.raises(TooManyBadRows, match="damaged or cut off"):
        load(f"{good},{cut}", max_bad_fraction=1.0)


def test_a_missing_file_is_named_with_its_field(tmp_path):
    with pytest.raises(ValueError, match=r"data\.eval: .*nowhere\.jsonl.*does not exist"):
        load(tmp_path / "nowhere.jsonl", name="eval")


def test_a_long_prompt_keeps_its_end_or_start_or_is_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1, prompt="0123456789"), row(2, prompt="ab")])
    for mode, kept in (("keep_end", "6789"), ("keep_start", "0123")):
        pairs, report = load(path, Limits(5, 9, 99, mode))
        assert [texts(pair.item)[0] for pair in pairs] == [kept, "ab"]
        assert [pair.item.prompt[0] for pair in pairs] == [BOS, BOS]
        assert len(pairs[0].item.prompt) == 5
        assert report.noted["truncated_prompt"].count == 1
    pairs, report = load(path, Limits(5, 9, 99, "drop"), max_bad_fraction=0.0)
    assert [texts(pair.item)[0] for pair in pairs] == ["ab"]
    assert report.dropped["prompt_too_long"].count == 1
    assert report.rows == report.kept + 1


def test_truncation_of_a_prompt_keeps_a_leading_bos_at_every_limit():
    tokens = np.array([BOS, 5, 6, 7], np.int32)
    for limit, expected in ((1, [BOS]), (2, [BOS, 7]), (3, [BOS, 6, 7]), (4, [BOS, 5, 6, 7])):
        assert loading.truncate_prompt(tokens, limit=limit, keep_end=True, bos_id=BOS).tolist() == expected
    assert loading.truncate_prompt(tokens, limit=2, keep_end=True, bos_id=None).tolist() == [6, 7]


def test_a_cut_response_does_not_end_in_eos_and_a_complete_one_does(tmp_path):
    pairs, report = load(write(tmp_path / "a.jsonl", [row(1, chosen="abcd", rejected="abc")]), Limits(99, 4, 999))
    chosen, rejected = pairs[0].item.responses
    assert (Bytes().decode(chosen), Bytes().decode(rejected)) == ("abcd", "abc")
    assert (EOS in chosen, rejected[-1]) == (False, EOS)
    assert report.noted["truncated_response"].count == 1


def test_what_truncation_makes_useless_is_a_bad_row(tmp_path):
    limits = Limits(max_prompt_length=20, max_completion_length=4, row_tokens=24)
    rows = [
        row(1, chosen="same start", rejected="same end"),
        row(2, chosen="    after the spaces", rejected="x"),
        row(3, prompt="p" * 19),
        row(4, prompt="p"),
    ]
    pairs, report = load(write(tmp_path / "a.jsonl", rows), limits, max_bad_fraction=0.9)
    assert len(pairs) == 1
    reasons = ["identical_after_truncation", "response_truncated_to_nothing", "longer_than_row"]
    assert list(report.bad) == reasons
    assert "28 tokens, a row holds 24; raise data.row_tokens" in report.bad["longer_than_row"].detail


def test_a_pair_needs_its_prompt_twice_where_responses_do_not_share_it(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1, prompt="p" * 9, chosen="a", rejected="b")])
    assert load(path, Limits(10, 2, 14))[1].kept == 1
    with pytest.raises(TooManyBadRows, match="24 tokens, a row holds 23"):
        load(path, Limits(10, 2, 23, share_prompt=False))
    assert load(path, Limits(10, 2, 24, share_prompt=False))[1].kept == 1


def test_limits_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"max_prompt_length must be at least 1"):
        Limits(0, 1, 1)
    with pytest.raises(ValueError, match="keep_end, keep_start, drop, got 'middle'"):
        Limits(1, 1, 1, "middle")


def test_ids_are_unique_and_duplicates_are_kept_and_noted(tmp_path):
    rows = [row(1), row(1), row(2, id="x"), row(3, id="x"), row(4, id="x#2"), row(5, id="x")]
    pairs, report = load(write(tmp_path / "a.jsonl", rows))
    first = parse_preference(row(1)).id
    assert ids(pairs) == [first, f"{first}#2", "x", "x#2", "x#2#2", "x#3"]
    assert {note: count.count for note, count in report.noted.items()} == {"duplicate_row": 1, "duplicate_id": 3}


def test_a_weight_takes_a_reproducible_share_or_repeats(tmp_path):
    a = write(tmp_path / "a.jsonl", [row(i) for i in range(40)])
    b = write(tmp_path / "b.jsonl", [row(i) for i in range(100, 110)])
    half, report = load(f"{a}=0.5,{b}")
    assert len(half) == 30
    assert report.sources[a] == {"weight": 0.5, "available": 40, "rows": 20, "kept": 20}
    assert "20  rows taken of the 40" in report.table()
    assert ids(half) == ids(load(f"{a}=0.5,{b}")[0])
    assert set(ids(half[:20])) < set(ids(load(a)[0]))
    assert ids(half) != ids(load(f"{a}=0.5,{b}", seed=1)[0])
    more, report = load(f"{b}=2.5")
    assert len(more) == 25 == len(set(ids(more)))
    assert not report.noted
    assert {name.split("#")[0] for name in ids(more)} == set(ids(load(b)[0]))


def test_hosts_load_disjoint_rows_that_together_are_all(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(i) for i in range(11)])
    shares = [ids(load(path, host=host, host_count=2)[0]) for host in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(ids(load(path)[0]))


def test_the_held_out_split_depends_on_prompt_and_seed_alone():
    pairs = [PairItem(Item(f"{i}-{j}", np.array([1, i]), ())) for i in range(2000) for j in range(2)]
    train, heldout = split_heldout(pairs, 0.2, 0)
    assert not {p.item.prompt[1] for p in train} & {p.item.prompt[1] for p in heldout}
    assert len(train) + len(heldout) == len(pairs)
    assert abs(len(heldout) / len(pairs) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 2000)  # four standard errors over prompts
    again = split_heldout(pairs[::-1][:1000], 0.2, 0)[1]
    assert set(ids(again)) == set(ids(heldout)) & set(ids(pairs[::-1][:1000]))
    assert set(ids(split_heldout(pairs, 0.2, 1)[1])) != set(ids(heldout))
    assert split_heldout(pairs, 0, 0) == (pairs, [])
    with pytest.raises(ValueError, match="held-out fraction"):
        split_heldout(pairs, 1.0, 0)


def test_records_and_items_of_one_prompt_are_held_out_together():
    records = [parse_preference(row(i // 2, chosen=f"c{i}")) for i in range(100)]
    train, heldout = split_heldout(records, 0.5, 0)
    assert heldout
    assert not {record.prompt for record in train} & {record.prompt for record in heldout}


def test_a_prompt_is_the_same_whatever_its_form_its_spaces_and_its_unicode_form():
    text = "caf\u00e9 or tea?"
    same = [f"  {text}\n", "cafe\u0301  or\ttea?", [{"role": "user", "content": text}]]
    same.append([{"role": "system", "content": " "}, {"role": "user", "content": text}])
    assert {content_key(prompt) for prompt in same} == {content_key(text)}
    other = ["Caf\u00e9 or tea?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]]
    assert len({content_key(prompt) for prompt in [text, *other]}) == 3


def test_neither_the_tokenizer_nor_the_form_of_a_prompt_moves_the_held_out_split():
    texts = [f"question {i}?" for i in range(200)]
    messages = [[{"role": "user", "content": f"{text}\n"}] for text in texts]
    forms = [
        [Item(str(i), np.array([1]), (), content_key(text)) for i, text in enumerate(texts)],
        [Item(str(i), np.array([i, 2]), (), content_key(prompt)) for i, prompt in enumerate(messages)],
        [parse_prompt({"prompt": prompt, "id": str(i)}) for i, prompt in enumerate(messages)],
    ]
    first, *others = [[entry.id for entry in split_heldout(entries, 0.1, 0)[1]] for entries in forms]
    assert 0 < len(first) < 50
    assert others == [first, first]


def test_a_million_ids_have_numbers_of_their_own():
    numbers = {stable_id(str(i)) for i in range(10**6)}
    assert len(numbers) == 10**6, "two of them would share their random draws"
    assert 2**63 < max(numbers) < 2**64


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.35, 1.0])
def test_label_noise_flips_exactly_the_fraction_whatever_the_order(fraction):
    pairs = [PairItem(Item(str(i), np.array([1]), ())) for i in range(51)]
    noisy = flip_labels(pairs, fraction, 3)
    assert ids(noisy) == ids(pairs)
    assert sum(pair.flipped for pair in noisy) == round(fraction * 51)
    assert all(pair.pairs == (((1, 0),) if pair.flipped else ((0, 1),)) for pair in noisy)
    flipped = {pair.item.id for pair in noisy if pair.flipped}
    assert {pair.item.id for pair in flip_labels(pairs[::-1], fraction, 3) if pair.flipped} == flipped
    assert flipped <= {pair.item.id for pair in flip_labels(pairs, min(1.0, fraction + 0.1), 3) if pair.flipped}


def test_flipping_twice_restores_the_labels():
    pairs = [PairItem(Item(str(i), np.array([1]), ())) for i in range(9)]
    assert flip_labels(flip_labels(pairs, 0.5, 1), 0.5, 1) == pairs
    with pytest.raises(ValueError, match="label_noise"):
        flip_labels(pairs, 1.1, 1)


def test_the_recorded_duplicates_are_noted_beside_their_twins(shared_data, tmp_path):
    with gzip.open(shared_data / "badrows" / "real_malformed_rows.jsonl.gz", "rt", encoding="utf-8") as file:
        raw = [entry["raw"] for entry in map(json.loads, file) if "duplicate_row" in entry["reasons"]]
    path = write(tmp_path / "a.jsonl", raw + raw)
    items, report = loading.load_demonstrations(path, Bytes(), limits=Limits(9999, 9999, 99999))
    assert len({item.id for item in items}) == len(items) == 2 * len(raw)
    assert report.noted["duplicate_row"].count >= len(raw)


def test_the_recorded_malformed_rows_stop_a_run(shared_data, tmp_path):
    with gzip.open(shared_data / "badrows" / "real_malformed_rows.jsonl.gz", "rt", encoding="utf-8") as file:
        raw = [entry["raw"] for entry in map(json.loads, file) if "response" not in entry["raw"]]
    with pytest.raises(TooManyBadRows) as caught:
        load(write(tmp_path / "a.jsonl", raw))
    for reason in ("identical_pair", "empty_rejected", "tie", "prompt_prefix_mismatch", "stray_role_marker"):
        assert reason in str(caught.value)


def test_real_preferences_load_with_few_bad_rows_and_in_seconds(shared_data):
    folder = shared_data / "preference"
    spec = ",".join(str(folder / f"hh_helpful_{name}_test.jsonl.gz") for name in ("online", "rejection_sampled"))
    start = time.perf_counter()
    pairs, report = load(spec)
    assert time.perf_counter() - start < 30  # reading and parsing alone take about one second
    assert report.rows == 3844
    assert set(report.bad) == {"stray_role_marker"}
    assert report.bad_fraction < 0.02
    assert len(pairs) == report.kept == report.rows - report.bad_rows


def test_equal_scores_are_left_out_and_counted_and_stop_no_run(tmp_path):
    rows = [
        {"prompt": "q", "chosen": f"a{i}", "rejected": "b", "score_chosen": i, "score_rejected": 1} for i in range(3)
    ]
    pairs, report = load(write(tmp_path / "a.jsonl", rows))
    assert [pair.item.id for pair in pairs] and len(pairs) == 2
    assert (report.bad_rows, report.dropped["equal_scores"].count) == (0, 1)
    assert "dropped       1  equal_scores" in report.table()


def test_a_field_name_that_is_no_text_does_not_break_the_report(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"\ud800": 1, "prompt": "q"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load(str(tmp_path / "a.jsonl"), max_bad_fraction=1.0, workdir=tmp_path)
    assert "ud800" in json.loads((tmp_path / "data" / "train.json").read_text())["bad"]["missing_field"]["detail"]


def test_a_conversation_knows_the_prompts_that_it_begins_with():
    said = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
    talk = [{"role": role, "content": text} for role, text in said]
    expected = {content_key(talk[:2]), content_key("A"), content_key(talk[1:])}
    assert set(openings_of(talk)) == expected
    assert openings_of("A") == openings_of(talk[1:2]) == ()
