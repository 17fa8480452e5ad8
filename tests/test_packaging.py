"""Dockerfile, workflow and issue forms: what they copy, run and name exists, and their pins are the project's."""

import fnmatch
import json
import re
import shlex
import subprocess
import tomllib
from typing import Any

import pytest
import yaml
from conftest import ROOT

from dpo import installation

DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ").splitlines()
    if line.strip()
]
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


def instructions(name: str) -> list[str]:
    return [rest for kind, rest in INSTRUCTIONS if kind == name]


def test_the_image_copies_and_runs_what_exists() -> None:
    assert {kind for kind, _ in INSTRUCTIONS} == {
        "FROM",
        "SHELL",
        "RUN",
        "USER",
        "WORKDIR",
        "ARG",
        "ENV",
        "COPY",
        "CMD",
    }
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", instructions("FROM")[0])
    assert instructions("USER") == ["1000"]  # not root, and no later instruction goes back
    copied = [word for rest in instructions("COPY") for word in shlex.split(rest)[:-1] if not word.startswith("--")]
    assert copied == ["requirements.txt", "requirements-dev.txt", "."]
    for name in copied:
        assert (ROOT / name).exists() and not any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)
    program, script = json.loads(instructions("CMD")[0])
    assert program == "python" and (ROOT / script).is_file()
    order = [kind for kind, _ in INSTRUCTIONS]
    assert instructions("ARG") == ["COMMIT="] and instructions("ENV")[-1] == f"{installation.COMMIT}=$COMMIT"
    assert order.index("USER") < order.index("COPY")  # nothing of root's lies in the project's folder


def test_the_image_installs_what_make_setup_does() -> None:
    def installed(text: str) -> set[str]:
        calls = re.findall(r"pip install (.*?)(?:&&|\n|$)", text)
        return {word for call in calls for word in shlex.split(call) if not word.startswith("--")} - {"-r", "-e"}

    makefile = (ROOT / "Makefile").read_text()
    assert installed("\n".join(instructions("RUN"))) == installed(makefile) > {"requirements.txt", "."}
    assert ".venv/.installed" in DOCKERFILE and "INSTALLED := $(VENV)/.installed" in makefile


def test_the_image_leaves_out_what_git_ignores_and_nothing_that_is_needed() -> None:
    ignored_by_git = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    folders = [name for name in ignored_by_git if "." not in name.strip(".") and "*" not in name]
    assert {name for name in folders if name not in IGNORED and f"**/{name}" not in IGNORED} == set()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("the project's folder is no git checkout")
    left_out = {path.split("/")[0] for path in tracked if path.split("/")[0] in IGNORED}
    assert left_out <= {".ci", ".github"}
    assert not [path for path in tracked if "__pycache__" in path]


def test_the_workflow_runs_the_tests() -> None:
    workflow: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert workflow[True].keys() == {"push", "pull_request"} and workflow["permissions"] == {"contents": "read"}  # "on"
    (job,) = workflow["jobs"].values()
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"] == [oldest, "3.13"] and job["timeout-minutes"] < 120
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs[-1] == "make test"
    for command in runs:
        words = command.split()
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        else:
            assert words[0] == ".venv/bin/python" and (ROOT / words[1]).is_file()
    for step in job["steps"]:
        assert "run" in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step
    setup = next(step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert [*ROOT.glob(setup["cache-dependency-path"])] and setup["python-version"] == "${{ matrix.python }}"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_the_form_that_github_reads(form: Any) -> None:
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "labels", "body"} and content["body"]
    assert all(entry.keys() == {"type", "id", "attributes", "validations"} for entry in content["body"])
    assert {entry["type"] for entry in content["body"]} <= {"textarea", "input", "dropdown", "checkboxes"}
    identifiers = [entry["id"] for entry in content["body"]]
    assert len(set(identifiers)) == len(identifiers) and all(re.fullmatch(r"[\w-]+", name) for name in identifiers)
    for entry in content["body"]:
        assert entry["attributes"].keys() <= {"label", "description", "placeholder", "value", "render"}
        assert isinstance(entry["validations"]["required"], bool)


def test_a_report_of_a_fault_asks_for_files_that_there_are() -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    written = "".join((ROOT / "dpo" / "run" / f"{name}.py").read_text() for name in ("folder", "provenance"))
    assert "scripts/doctor.py" in text
    for script in re.findall(r"scripts/\w+\.py", text):
        assert (ROOT / script).is_file()
    for name in ("config.yaml", "log.txt", "data_funnel.json", "provenance.json"):
        assert name in text and f'"{name}"' in written
