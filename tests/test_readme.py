"""README and docs tell the truth: commands are accepted, links work, keys exist, numbers are those of the records."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo.data.parse import ranked_pairs
from dpo.data.rows import generic
from settings import all_keys, load_config

PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
FOLDERS = "benchmarks|config|data|docs|dpo|experiments|scripts|tests"
OTHER_COMMANDS = ("source .venv/bin/activate", "pip install ", "printf ", "docker ")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a page as a shell passes them on, with variables of the page filled in."""
    known = {"USER": "me", "PWD": "."}
    for line in "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        for command in re.split(r" && | \| ", line):
            words = [re.sub(r"\$\{?([A-Z]+)\}?", lambda m: known[m[1]], w) for w in shlex.split(command, comments=True)]
            while words and (given := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
                known[given[1]] = given[2]
                words.pop(0)
            if words:
                yield words
    for code in re.findall(rf"`(python (?:{FOLDERS})/[^`<]*)`", text):  # in a sentence
        yield shlex.split(code)


COMMANDS = sorted({(name, *words) for name, text in TEXTS.items() for words in commands(text)})


def found(kind: str) -> list[Any]:
    """Return the commands of a kind: train, script, make or other."""
    chosen = [command[1:] for command in COMMANDS if kind_of(command[1:]) == kind]
    return [pytest.param(list(words), id=" ".join(words)[:60]) for words in dict.fromkeys(chosen)]


def kind_of(words: tuple[str, ...]) -> str:
    if "train.py" in words or words[0] == "sbatch":
        return "train"
    if words[0] == "python" and re.match(rf"({FOLDERS})/", words[1]):
        return "script"
    return "make" if words[0] == "make" else "other"


@pytest.mark.parametrize("words", found("train"))
def test_training_commands_pass_validation(words: list[str]) -> None:
    start = next(i for i, word in enumerate(words) if word.endswith(("train.py", ".sbatch")))
    given = words[start + 1 :]
    sweep = "-m" in given
    given = [word for word in given if word != "-m" and not word.startswith("hydra")]
    assert load_config([first_of(word) for word in given] if sweep else given)


def first_of(word: str) -> str:
    """An override with the first value of a sweep, or the lower end of an interval."""
    (override,) = OverridesParser.create().parse_overrides([word])
    if override.is_interval_sweep():
        return f"{override.key_or_group}={override.value().start}"
    first = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
    return word if first is None else f"{override.key_or_group}={first}"


class Parsed(BaseException):
    """The options of a command are in order."""


def stop_after(name: str, inside: list[str]) -> Callable[..., Any]:
    """Return ArgumentParser's method of this name, which ends in Parsed unless another of them has called it."""
    parse = getattr(argparse.ArgumentParser, name)

    def stop(*given: Any, **more: Any) -> Any:
        inside.append(name)
        result = parse(*given, **more)
        inside.pop()
        if inside:
            return result
        if name == "parse_known_args":  # a script that lets overrides pass
            assert not [other for other in result[1] if other.startswith("-") or "=" not in other]
        raise Parsed

    return stop


@pytest.mark.parametrize("words", found("script"))
def test_options_of_scripts_are_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []
    for method in ("parse_args", "parse_intermixed_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stop_after(method, inside))
    monkeypatch.setattr(sys, "argv", words[1:])
    folder, name = Path(words[1]).parent, Path(words[1]).stem
    monkeypatch.syspath_prepend(ROOT / folder)
    module = importlib.import_module(name)
    if str(folder) == "docs":  # these take no options
        assert len(words) == 2 and module.__file__
        return
    with pytest.raises(Parsed):
        module.main()
    if name in ("plan", "rounds"):  # they take the overrides of train.py
        given = [word for word in words[2:] if re.match(r"\+?[a-z_.]+=", word)]
        assert load_config(["exp_name=x", *given])


def test_make_targets_exist() -> None:
    targets = [param.values[0][1] for param in found("make")]
    assert {"demo", "test"} <= {*targets}
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_other_commands_are_known() -> None:
    assert not [c for p in found("other") if not (c := " ".join(p.values[0])).startswith(OTHER_COMMANDS)]


def test_commands_can_be_pasted_into_zsh_and_bash() -> None:
    """Signs that zsh expands stand in quotes, and nothing has to be filled in."""
    lines = [line for text in TEXTS.values() for block in blocks(text, "bash") for line in block.splitlines()]
    bare = [re.sub(r"'[^']*'|\"[^\"]*\"|(^| )#.*", "", line) for line in lines]
    assert len(bare) > 50 and not [line for line in bare if re.search(r"[][{}()*?<>]", line)]
    for text in TEXTS.values():
        script = "\n".join(blocks(text, "bash"))
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)


@pytest.mark.full
def test_inspect_data_command(cache_dir: Path) -> None:
    [words] = [
        p.values[0] for p in found("script") if "scripts/inspect_data.py" in p.values[0] and "n=2" in p.values[0]
    ]
    done = subprocess.run(
        [sys.executable, *words[1:], f"cache_dir={cache_dir}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "examples" in done.stdout, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[page]):
        file, _, anchor = link.partition("#")
        target = (PAGES[page].parent / file).resolve() if file else PAGES[page]
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", target.read_text("utf-8"), flags=re.S), re.M)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, link


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)(?=[ `])", TEXTS[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/names.md"])  # other trainers' names
def test_named_keys_exist(page: str) -> None:
    known = {*all_keys(), "experiment", "hydra.searchpath"}
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    settings = [words for code in re.findall(r"`([^`\n]+)`", text) if "(" not in code for words in code.split()]
    names = [match[1] for word in settings if (match := re.match(r"'?\+?([a-z_]\w*(?:\.\w+)*)=(?!=)", word))]
    open_ended = ("optimizer_kwargs.", "adapter.peft_kwargs.", "dataset_sources.", "columns.")
    unknown = {name for name in names if name not in known and not name.startswith(open_ended)}
    # A key of loss without its group; an example of another trainer's name; of how a setting is written.
    assert not {name for name in unknown if f"loss.{name}" not in known} - {"learning_rate", "key"}


def test_the_table_of_keys_names_keys() -> None:
    table = TEXTS["docs/keys.md"].split("| key | what it does |")[1].split("\n\n")[0]
    names = re.findall(r"`([a-z_.]+)=?`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert len(names) > 50 and not {*names} - {*all_keys()}


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


# --- Examples ---

ROWS = [  # of docs/data.md in order: responses, pairs or ranked responses, demonstration, label
    (["4.", "22."], [(0, 1)], False, None),
    ([" 4.", " 22."], [(0, 1)], False, None),
    (["22.", "4.", "Four, of course."], [(1, 0), (2, 0)], False, None),
    (["22.", "4.", "Four, of course."], [(1, 2), (1, 0), (2, 0)], False, None),
    (["4.", "22."], [(0, 1)], False, None),
    (["4."], [], True, None),
    (["22."], [], True, False),
    (["4."], [], True, None),
    (["4.", "22."], [(0, 1)], False, None),
]


def test_rows_become_what_the_page_says() -> None:
    rows = [json.loads(block) for block in blocks(TEXTS["docs/data.md"], "json")]
    for row, (responses, pairs, demonstration, label) in zip(rows, ROWS, strict=True):
        parsed = generic(row)
        texts = [text if isinstance(text, str) else text[0]["content"] for text in parsed.responses]
        made = ranked_pairs(parsed.scores, 10, 0)[0] if parsed.scores else parsed.pairs
        assert (texts, sorted(made), parsed.demonstration, parsed.label) == (
            responses,
            sorted(pairs),
            demonstration,
            label,
        )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(TEXTS[page], "python")])
def test_python_examples_run(page: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks(TEXTS[page], "python"):
        exec(block.replace("runs/my_dpo", str(run_dir)), names)
    if page == "docs/python.md":
        assert len(capsys.readouterr().out.splitlines()) >= 2 and names["config"].n_examples == 160


# --- Numbers ---


def speeds(record: str) -> dict[str, dict[str, float]]:
    """Return {row: {column: number}} of a record's table of speeds."""
    text = (ROOT / "benchmarks" / f"{record}.md").read_text(encoding="utf-8")
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|")
    cells = [[cell.partition(" (")[0] for cell in row] for row in rows]  # without ranges
    return {row[0]: {name: float(cell) for name, cell in zip(head[1:], row[1:]) if cell} for row in cells}


def ratios() -> Iterator[str]:
    """Yield every ratio of speeds that the records hold, with one and with two digits."""
    for record in ("dpo", "sweep", "dpo_sentiment"):
        found = speeds(record)
        numbers = [row["ratio to the original"] for row in found.values()]
        if "TRL" in found:
            numbers.append(found["TRL"]["seconds"] / found["+ stored reference"]["seconds"])
        yield from (f"{number:.{digits}f}" for number in numbers for digits in (1, 2))


@pytest.mark.parametrize("page", PAGES)
def test_speeds_are_those_of_the_records(page: str) -> None:
    assert {*re.findall(r"(\d+\.\d+) times", TEXTS[page])} <= {*ratios()}


def numbered(page: str) -> list[tuple[str, str]]:
    """Return (names of records, paragraph or table) of each place of a page that says where its numbers are from."""
    return re.findall(r"<!-- numbers: (.*?) -->\n(.*?)(?:\n\n|$)", TEXTS[page], re.S)


MARKED = [(page, *place) for page in PAGES for place in numbered(page)]


@pytest.mark.parametrize(("page", "records", "text"), MARKED, ids=[f"{m[0]}: {m[1]}" for m in MARKED])
def test_numbers_are_those_of_the_records(page: str, records: str, text: str) -> None:
    known = "".join((ROOT / record).read_text(encoding="utf-8") for record in records.split())
    plain = re.sub(r"\]\([^)]*\)|\d+\.\d+ times", "", text)  # ratios have a test of their own
    decimals = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", plain)
    assert decimals and not [n for n in decimals if not re.search(rf"(?<![\d.]){re.escape(n)}(?![\d.])", known)]


def test_pages_with_results_say_where_numbers_are_from() -> None:
    assert {page for page, *_ in MARKED} >= {"README.md", "docs/start.md", "docs/speed.md", "docs/results.md"}


def test_the_log_of_measurements_has_every_record() -> None:
    records = {path.name for path in (ROOT / "benchmarks").glob("*.md")} - {"README.md"}
    rows = [line for line in TEXTS["docs/LOG.md"].splitlines() if re.match(r"\| \d{4}-", line)]
    dates = [row.split(" | ")[0] for row in rows]
    assert records <= {*re.findall(r"benchmarks/(\w+\.md)", "\n".join(rows))} and dates == sorted(dates, reverse=True)
    for row in rows:
        _, _, result, link = row.strip("| ").split(" | ")
        record = (ROOT / "docs" / re.findall(r"\((.*)\)", link)[0]).resolve().read_text(encoding="utf-8")
        assert not [n for n in re.findall(r"(?<![\w.])\d+\.\d+", result) if n not in record], row


def test_the_number_of_losses() -> None:
    names = {path.stem for path in (ROOT / "config" / "loss").glob("*.yaml")} - {"pairs", "mix", "sft", "nll"}
    assert f"[{len(names)}](docs/losses.md)" in TEXTS["README.md"]


# --- The site ---


def test_generated_parts_are_those_of_the_code() -> None:
    code = "import sys, make_reference as made; sys.exit(any(made.written(p) != made.text(p) for p in made.PAGES))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", timeout=100)
    assert done.returncode == 0, "docs/keys.md or python.md is old: run python docs/make_reference.py"


@pytest.mark.full
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert pages >= {Path(page).stem for page in PAGES if page.startswith("docs/")}
    for page in (tmp_path / "site").rglob("*.html"):
        links = {link for link in re.findall(r'href="([^"#]+)', page.read_text("utf-8")) if ":" not in link}
        assert page.name == "404.html" or not [link for link in links if not (page.parent / link).exists()], page
