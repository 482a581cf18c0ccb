"""The embedded world: a made-up instruction language whose answers a rule can grade. Numpy only.

A prompt is one of four tasks over six words in each of eight categories:

    name : fruit tool animal     a word of each of these categories, in this order
    repeat : saw red fig         the same words in the same order
    first of : saw red fig       saw
    last of : saw red fig        fig

A response is `[chatter] [opener] body [again body] [closing]`. Authors of responses differ in their habits: how often
they are right, use the opener `sure ,` and the closing `all done .`, say the body twice, or chatter
(`let me see`, ...). Where an author errs it is mostly with the task's one systematic slip (see `slip_body`). Who they
are, in each world, stands in `world_authors`.

Gold reward, between -0.3 and 1: 0.6 if the body is right, 0.25 for the closing, 0.15 for the opener, -0.3 if the body
is said twice. Chatter is worth nothing, wherever it stands: it is the spurious cue. In the preference pairs the careful
author is also the chatty one (`WorldSpec.cue`), so that chatter, and with it length, goes with the clean label
without being its cause.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sera_jax import whole
from sera_jax.core import Stream, rng_for
from sera_jax.world_authors import AUTHORS, Habits

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "fox", "owl", "hen", "cow"),
    "fruit": ("apple", "pear", "plum", "fig", "lime", "mango"),
    "colour": ("red", "blue", "green", "grey", "pink", "brown"),
    "tool": ("saw", "axe", "drill", "rake", "hoe", "clamp"),
    "metal": ("iron", "tin", "zinc", "copper", "nickel", "lead"),
    "tree": ("oak", "elm", "ash", "pine", "birch", "maple"),
    "cloth": ("hat", "coat", "scarf", "glove", "sock", "boot"),
    "tune": ("harp", "flute", "drum", "lute", "bell", "horn"),
}
CONTENT_WORDS: tuple[str, ...] = tuple(word for words in CATEGORIES.values() for word in words)
TASKS: tuple[str, ...] = ("name", "repeat", "first", "last")
OPENER: tuple[str, ...] = ("sure", ",")
CLOSING: tuple[str, ...] = ("all", "done", ".")
AGAIN = "again"
CHATTER: tuple[tuple[str, ...], ...] = (("let", "me", "see"), ("well", "now"), ("as", "you", "know"))
_CHATTER_WORDS = frozenset(word for phrase in CHATTER for word in phrase)

GOLD_TERMS: dict[str, float] = {"right": 0.6, "closing": 0.25, "opener": 0.15, "twice": -0.3}

SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
_FUNCTION_WORDS = ("name", "repeat", "first", "last", "of", ":", *CATEGORIES)
_SAID = (*OPENER, *CLOSING, AGAIN, *(word for phrase in CHATTER for word in phrase), *CONTENT_WORDS)
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys((*SPECIAL_TOKENS, *_FUNCTION_WORDS, *_SAID)))
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' ' }}"
    "{% else %}{{ '<assistant> ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


# A quarter of the prompts are of the `name` task, which has few: 8 * 7 + 8 * 7 * 6. Half are left to training at least.
NAME_PROMPTS = 392
MAX_HELDOUT = 700


@dataclasses.dataclass(frozen=True)
class WorldSpec:
    """What `make_world` makes.

    Attributes:
        name: which world, a name in `AUTHORS`; prompts and preference pairs are those of any other.
        seed: of every draw of the world; another seed is another sample of the same language.
        pretrain, demonstrations, preferences: rows for training.
        heldout_preferences, heldout_prompts: rows for evaluation; their prompts occur in no training row.
        heldout_demonstrations: answers of the demonstrator to the held-out prompts in turn (none if there are none).
        prompts: further training prompts without a response (for methods that sample their own).
        demonstrator: author of the demonstrations, a name in `AUTHORS[name]`.
        cue: how strongly chatter goes with the careful author of preference pairs, 0 to 1: the careful author
            chatters with probability 0.5 + cue / 2, the careless one with 0.5 - cue / 2.
        heldout_tasks: of `TASKS`; no demonstration, preference pair or training prompt sets one of these. The
            pretraining text and all that is held out have every task.
    """

    name: str = "habits"
    seed: int = 0
    pretrain: int = 8000
    demonstrations: int = 200
    preferences: int = 800
    heldout_preferences: int = 400
    heldout_prompts: int = 200
    heldout_demonstrations: int = 200
    prompts: int = 400
    demonstrator: str = "better"
    cue: float = 0.6
    heldout_tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.name not in AUTHORS:
            raise ValueError(f"world.name={self.name!r} is unknown; choose one of {', '.join(AUTHORS)}")
        authors = AUTHORS[self.name]
        if self.demonstrator not in authors:
            raise ValueError(f"world.demonstrator={self.demonstrator!r} is unknown; choose one of {', '.join(authors)}")
        if not 0.0 <= self.cue <= 1.0:
            raise ValueError(f"world.cue={self.cue} is outside 0 .. 1; 0 makes chatter carry no sign of the label")
        if not set(self.heldout_tasks) < set(TASKS) or len(set(self.heldout_tasks)) != len(self.heldout_tasks):
            raise ValueError(
                f"world.heldout_tasks={tuple(self.heldout_tasks)!r}; give each of {', '.join(TASKS)} at most once, and "
                "leave one at least to train on"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 0:
                raise ValueError(f"world.{field.name}={value} is negative; give 0 or more")
        if self.heldout_prompts + self.heldout_preferences > MAX_HELDOUT:
            raise ValueError(
                f"world.heldout_prompts={self.heldout_prompts}, world.heldout_preferences={self.heldout_preferences}: "
                f"together more than {MAX_HELDOUT}; lower one, since their prompts are kept out of training and the "
                f"`name` task has only {NAME_PROMPTS}"
            )


@dataclasses.dataclass(frozen=True)
class Marks:
    """What the gold reward looks at in a response."""

    right: bool
    closing: bool
    opener: bool
    twice: bool

    @property
    def gold(self) -> float:
        """The weighted sum of `GOLD_TERMS`."""
        return sum((value for term, value in GOLD_TERMS.items() if getattr(self, term)), 0.0)


@dataclasses.dataclass(frozen=True)
class Task:
    """A parsed prompt: one of `TASKS` and the words listed (for `name`, categories)."""

    kind: str
    words: tuple[str, ...]

    def is_right(self, body: Sequence[str]) -> bool:
        """Whether `body` answers the prompt."""
        if self.kind == "name":
            return len(body) == len(self.words) and all(b in CATEGORIES[c] for b, c in zip(body, self.words))
        wanted = {"repeat": self.words, "first": self.words[:1], "last": self.words[-1:]}[self.kind]
        return tuple(body) == wanted


def parse_prompt(prompt: str) -> Task:
    """The task that a prompt sets; ValueError if it is not of the language."""
    words = tuple(prompt.split())
    match words:
        case ("name", ":", _, _, *_) if set(words[2:]) <= set(CATEGORIES):
            return Task("name", words[2:])
        case ("repeat", ":", _, _, *_):
            return Task("repeat", words[2:])
        case ("first" | "last", "of", ":", _, _, *_):
            return Task(words[0], words[3:])
    raise ValueError(f"prompt {prompt!r} is not of the embedded world; gold rewards exist for its prompts only")


def marks(prompt: str, response: str) -> Marks:
    """Parse `response` and say which terms of the gold reward it earns.

    Chatter words are dropped first, wherever they are. The body is what stands between opener and closing, up to
    `again`; anything said after `again` counts as saying it twice.
    """
    task = parse_prompt(prompt)
    words = [word for word in response.split() if word not in _CHATTER_WORDS]
    opener = tuple(words[: len(OPENER)]) == OPENER
    words = words[len(OPENER) :] if opener else words
    closing = tuple(words[-len(CLOSING) :]) == CLOSING
    words = words[: -len(CLOSING)] if closing else words
    twice = AGAIN in words
    body = words[: words.index(AGAIN)] if twice else words
    return Marks(right=task.is_right(body), closing=closing, opener=opener, twice=twice)


def gold(prompt: str, response: str) -> float:
    """Gold reward of a response, in [-0.3, 1]; ValueError if the prompt is not of the language."""
    return marks(prompt, response).gold


def right_body(task: Task, rng: np.random.Generator) -> list[str]:
    """A right body; `name` has several, drawn uniformly."""
    if task.kind == "name":
        return [str(rng.choice(CATEGORIES[category])) for category in task.words]
    return list({"repeat": task.words, "first": task.words[:1], "last": task.words[-1:]}[task.kind])


def slip_body(task: Task, rng: np.random.Generator) -> list[str]:
    """The task's systematic slip: goes back to the first category, leaves out the last word, or is off by one word."""
    if task.kind == "name":
        return right_body(Task("name", (*task.words[:-1], task.words[0])), rng)
    if task.kind == "repeat":
        return list(task.words[:-1])
    return [task.words[1] if task.kind == "first" else task.words[-2]]


def stray_body(task: Task, rng: np.random.Generator) -> list[str]:
    """A right body with one word exchanged for some other word that makes it wrong."""
    body = right_body(task, rng)
    while task.is_right(body):
        body[int(rng.integers(len(body)))] = str(rng.choice(CONTENT_WORDS))
    return body


def write_response(prompt: str, habits: Habits, rng: np.random.Generator) -> str:
    """One response to `prompt` by an author with these habits."""
    task = parse_prompt(prompt)
    if rng.random() < habits.right:
        body = right_body(task, rng)
    else:
        body = (slip_body if rng.random() < habits.slip else stray_body)(task, rng)
    words: list[str] = []
    if rng.random() < habits.chatter:
        for index in rng.permutation(len(CHATTER))[: int(rng.integers(1, 3))]:
            words += CHATTER[int(index)]
    if rng.random() < habits.opener:
        words += OPENER
    words += body
    if rng.random() < habits.twice:
        words += [AGAIN, *body]
    if rng.random() < habits.closing:
        words += CLOSING
    return " ".join(words)


def write_prompt(rng: np.random.Generator) -> str:
    """One prompt; the four tasks are equally likely."""
    task = TASKS[int(rng.integers(len(TASKS)))]
    if task == "name":  # every prompt of the 392 is equally likely
        count = 2 if rng.random() < 1 / (len(CATEGORIES) - 1) else 3
        return f"name : {' '.join(rng.choice(list(CATEGORIES), size=count, replace=False))}"
    count = int(rng.integers(2, 4)) if task == "repeat" else int(rng.integers(3, 5))
    words = " ".join(rng.choice(CONTENT_WORDS, size=count, replace=False))
    return f"repeat : {words}" if task == "repeat" else f"{task} of : {words}"


# One stream index per list, so that asking for more of one leaves the others as they were; the first ones draw prompts.
_DRAWN = ("heldout_prompts", "heldout_preferences", "pretrain", "demonstrations", "preferences", "prompts")
_LISTS = (*_DRAWN, "heldout_demonstrations")
_IN_DOMAIN = ("demonstrations", "preferences", "prompts")  # lists without the tasks that are held out


def make_world(spec: WorldSpec) -> dict[str, list[dict[str, Any]]]:
    """All rows of the world, the same for the same spec.

    Returns:
        Lists of JSON rows: `pretrain`, `demonstrations` and `heldout_demonstrations` {id, prompt, response};
        `preferences` and `heldout_preferences` {id, prompt, chosen, rejected, gold_chosen, gold_rejected} with clean
        labels and no ties; `heldout_prompts` and `prompts` {id, prompt}. Prompts of `heldout_prompts` and
        `heldout_preferences` are all different and occur in no list for training.
    """
    authors = AUTHORS[spec.name]
    careful = dataclasses.replace(authors["careful"], chatter=0.5 + spec.cue / 2)
    careless = dataclasses.replace(authors["careless"], chatter=0.5 - spec.cue / 2)
    heldout: set[str] = set()

    def draws(name: str) -> Iterator[tuple[np.random.Generator, str]]:
        left_out = spec.heldout_tasks if name in _IN_DOMAIN else ()
        for index in itertools.count():
            rng = rng_for(spec.seed, Stream.WORLD, _LISTS.index(name), index)
            prompt = write_prompt(rng)
            if prompt not in heldout and parse_prompt(prompt).kind not in left_out:
                if name.startswith("heldout"):
                    heldout.add(prompt)
                yield rng, prompt

    def rows(name: str, fill: Any) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for rng, prompt in draws(name):
            if len(out) == getattr(spec, name):
                break
            row = fill(rng, prompt)
            if row is not None:
                out.append({"id": f"{name}-{len(out):05d}", "prompt": prompt, **row})
        return out

    def pair(rng: np.random.Generator, prompt: str) -> dict[str, Any] | None:
        sides = [write_response(prompt, careful if rng.random() < 0.5 else careless, rng) for _ in range(2)]
        grades = [gold(prompt, side) for side in sides]
        if abs(grades[0] - grades[1]) < 1e-9:
            return None
        best = int(grades[1] > grades[0])
        return {
            "chosen": sides[best],
            "rejected": sides[1 - best],
            "gold_chosen": round(grades[best], 4),
            "gold_rejected": round(grades[1 - best], 4),
        }

    def answer(author: str) -> Any:
        return lambda rng, prompt: {"response": write_response(prompt, authors[author], rng)}

    imitated = answer(spec.demonstrator)
    fills = {"heldout_preferences": pair, "pretrain": answer("base"), "demonstrations": imitated, "preferences": pair}
    world = {name: rows(name, fills.get(name, lambda rng, prompt: {})) for name in _DRAWN}
    asked = itertools.cycle(row["prompt"] for row in world["heldout_prompts"])
    world["heldout_demonstrations"] = [
        {"id": f"heldout_demonstrations-{i:05d}", "prompt": prompt, **imitated(rng, prompt)}
        for i, prompt in zip(range(spec.heldout_demonstrations), asked)
        for rng in [rng_for(spec.seed, Stream.WORLD, len(_DRAWN), i)]
    ]
    return world


def write_tokenizer(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Write the word-level tokenizer as a folder that transformers' AutoTokenizer loads; returns the folder."""
    import tokenizers

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<user>", "<assistant>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory


def write_world(spec: WorldSpec, directory: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
    """Write the world's files; they appear all at once or not at all.

    A folder that already holds the world of this spec is used as it is.

    Returns:
        Paths by list name (`<name>.jsonl`), `tokenizer` (a folder) and `manifest` (`world.json`: spec and digests).

    Raises:
        ValueError: the folder holds something else.
    """
    directory = pathlib.Path(directory)
    paths = {name: directory / f"{name}.jsonl" for name in _LISTS}
    paths |= {"tokenizer": directory / "tokenizer", "manifest": directory / "world.json"}
    rows = make_world(spec)
    texts = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows[name]) for name in _LISTS}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    manifest = json.dumps({"spec": dataclasses.asdict(spec), "sha256": digests}, indent=2) + "\n"
    if directory.exists() and any(directory.iterdir()):
        found = paths["manifest"].read_text(encoding="utf-8") if paths["manifest"].exists() else ""
        if found == manifest:
            return paths
        raise ValueError(f"{directory} holds another world or other files; give a new folder or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_tokenizer(temporary / "tokenizer")
        (temporary / "world.json").write_text(manifest, encoding="utf-8")
        temporary.chmod(0o755)
        whole.appear(temporary, directory, last="world.json")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return paths
