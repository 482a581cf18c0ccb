"""README.md and docs/*.md cannot rot: their commands (and those of configs/ and studies/) are parsed by the program's
own parsers, and every file, test, function, field, metric, make target, link and heading they name is looked up."""

import ast
import contextlib
import dataclasses
import pathlib
import pkgutil
import re
import shlex
import sys
import typing
from collections.abc import Iterator

import pytest
from absl import flags

from sera_jax import compare, evaluate, export, generate, main, preflight, rankings, status, study
from sera_jax.config import Config, check_field
from sera_jax.data import prepare
from sera_jax.experiment.dry_run import look
from sera_jax.experiment.dry_run_report import as_text
from sera_jax.experiment.methods import parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [file for folder in ("configs", "studies") for file in sorted((ROOT / folder).glob("*.py"))]
SOURCE = {folder: "\n".join(p.read_text() for p in (ROOT / folder).rglob("*.py")) for folder in ("sera_jax", "tests")}
GROUPS = [name for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)]
ARGPARSE = {entry.__name__: entry for entry in (generate, evaluate, export, study, compare, rankings, status)}
BY_FLAGS = {entry.__name__ for entry in (main, preflight)}  # absl's, which name a config
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^for (\w+) in (.+); do\n(.*?)^done$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: pathlib.Path) -> str:
    return FENCE.sub("", page.read_text())


def spans(page: pathlib.Path) -> list[str]:
    """Every piece of inline code, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def shell(page: pathlib.Path) -> list[str]:
    """Every line of shell that a page shows, in fences and inline; continuations joined, `for` loops written out."""
    found = []
    for language, script in FENCE.findall(page.read_text()):
        if language == "sh":
            script = re.sub(r"\\\n\s*", "", script)
            found += LOOP.sub(lambda loop: "".join(turns(*loop.groups())), script).splitlines()
    return [line.strip() for line in found + spans(page)]


def docstring(config: pathlib.Path) -> list[str]:
    """The lines of a config's docstring, continuations joined."""
    text = ast.get_docstring(ast.parse(config.read_text())) or ""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()]


def turns(name: str, values: str, body: str) -> list[str]:
    return [body.replace(f"${name}", value) for value in values.split()]


def module_call(line: str) -> tuple[str, list[str]] | None:
    """(module, arguments) of `python -m module arguments`, whichever python."""
    call = re.match(r"(?:\S*/)?python3? -m (\S+)(.*)", line)
    return (call[1], shlex.split(call[2], comments=True)) if call else None


@contextlib.contextmanager
def absl_flags() -> Iterator[None]:
    """A place to parse absl's flags: those defined within, overrides of fields among them, are gone afterwards."""
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def config_of(*arguments: str) -> Config:
    """What `python -m sera_jax.main` makes of its arguments, by its own flags and checks."""
    command = ["sera_jax.main", *arguments]
    with absl_flags(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
        patch.chdir(ROOT)
        assert main.parse_flags(command) == command[:1], "a word that is no flag"
        return parse(main.CONFIG.value)


def anchors(page: pathlib.Path) -> set[str]:
    """The link targets of a page's headings, as code-hosting sites name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


SHOWN = {page.name: shell(page) for page in PAGES} | {config.name: docstring(config) for config in CONFIGS}
CALLS = [(name, *call) for name, lines in SHOWN.items() for line in lines if (call := module_call(line))]


@pytest.mark.parametrize("name, module, arguments", CALLS, ids=[f"{p} {m} {' '.join(a)}" for p, m, a in CALLS])
def test_every_command_is_understood_by_its_program(name, module, arguments):
    if module in BY_FLAGS:
        config_of(*arguments)
    elif module in ARGPARSE:
        ARGPARSE[module]._parser().parse_args(arguments)
    elif module == "sera_jax.data.prepare":
        with absl_flags():
            prepare.define_flags()
            assert flags.FLAGS([module, *arguments]) == [module]
    else:
        assert module in ("venv", "pytest", "sera_jax.data.forms"), f"{name}: python -m {module}"


def test_the_commands_are_found():
    """The tests here would pass on nothing: each entry is shown at least once, the loop once for each loss."""
    shown = [module for _, module, _ in CALLS]
    assert {*BY_FLAGS, "sera_jax.data.prepare", *ARGPARSE} <= set(shown)
    assert sum("--config.workdir=runs/losses/" in word for _, _, words in CALLS for word in words) == 5


@each_page
def test_every_override_outside_of_a_command_is_a_field_with_a_value_that_fits(page):
    lines = [line for line in shell(page) if "--config." in line and not module_call(line)]
    for override in (word for line in lines for word in shlex.split(line) if word.startswith("--config.")):
        field, _, value = override.removeprefix("--config.").partition("=")
        check_field(field)
        if value:
            ppo = field.startswith(("ppo.", "reward.")) or override.endswith("method=srppo")
            config_of(f"--config=configs/{'gsm8k' if ppo else 'hh'}_small.py", override)


@pytest.mark.parametrize("entry", [*ARGPARSE.values()], ids=[*ARGPARSE])
def test_help_is_printed(entry, capsys):
    with pytest.raises(SystemExit, match="0"):
        entry.main(["--help"])
    assert f"usage: python -m {entry.__name__}" in capsys.readouterr().out


@each_page
def test_every_field_named_exists(page):
    named = re.compile(rf"(?<![\w./-])((?:{'|'.join(GROUPS)})\.(?!(?:py|json)\b)\w+)")
    for span in spans(page):
        for field in named.findall(span):
            check_field(field)


@each_page
def test_every_make_target_named_exists(page):
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match[1] for line in shell(page) if (match := re.match(r"make (\w+)", line))}
    assert named <= targets


@each_page
def test_every_file_and_test_named_exists(page):
    words = [word for line in shell(page) for word in line.split()]
    for word in words:
        if path := re.match(r"(?:tests|configs|sera_jax|launch|docs|\.ci)/[\w/.-]*\w|studies/\w+\.py", word):
            assert (ROOT / path[0]).exists(), f"{page.name}: {path[0]}"
        if re.fullmatch(r"test_\w+", word):
            assert f"def {word}(" in SOURCE["tests"], f"{page.name}: {word}"


@each_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target} is no heading of {file.name}"


def test_every_function_of_the_table_of_equations_exists():
    table = re.findall(r"^\|[^|]+\|([^|]+)\|[^|]+\|$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    functions = [re.findall(r"`([\w.]+)`", cell) for cell in table if "`" in cell]
    assert len(functions) > 15
    for names in functions:
        module = names[0].rpartition(".")[0]
        for name in names:  # a bare name is of the module before it
            module = name.rpartition(".")[0] or module
            assert callable(pkgutil.resolve_name(f"sera_jax.{module}.{name.rpartition('.')[2]}")), name


def test_every_metric_named_is_written_somewhere():
    names = [span for span in spans(ROOT / "docs" / "metrics.md") if re.fullmatch(r"[\w/]+(\{.+\})?", span)]
    leaves = {leaf for name in names for leaf in re.findall(r"[a-z0-9_]+", name.rpartition("/")[2])}
    assert len(leaves) > 70
    assert {leaf for leaf in leaves if not re.search(rf"(?<![A-Za-z]){leaf}(?![A-Za-z])", SOURCE["sera_jax"])} == set()


def test_the_site_has_every_page():
    """What `make docs` would refuse, told without its environment."""
    pages = ast.literal_eval(re.search(r"^PAGES = (\[.*?^\])", (ROOT / "docs" / "conf.py").read_text(), re.M | re.S)[1])
    assert len(pages) == len(set(pages))
    assert {ROOT / f"{page}.md" for page in pages} == {*PAGES, ROOT / "CHANGELOG.md"} - {README}


def test_the_dry_run_that_is_shown_is_what_a_reader_gets(tmp_path):
    """Every line of the page, in its order; an ellipsis stands for lines that are left out."""
    block = re.search(r"^```text\n(dry run of .*?)^```$", (ROOT / "docs" / "data.md").read_text(), re.M | re.S)[1]
    config = config_of("--config=configs/quickstart.py")
    text = as_text(look(dataclasses.replace(config, workdir=str(tmp_path / "run"))))
    shown = iter(text.replace(str(tmp_path / "run"), config.workdir).splitlines())
    for line in block.splitlines():
        assert line == "..." or line in shown, line


def test_the_readme_is_short_and_sets_up_with_two_commands():
    assert len(README.read_text().splitlines()) <= 200
    assert {"make quickstart", "make test"} <= set(shell(README))
