"""How it is released: what the script checks of the distributions, and what the workflow may do."""

import importlib.util
import re
import subprocess
import tomllib

import pytest
import yaml

from tests.cases.processes import ROOT

SCRIPT = (ROOT / ".ci" / "release").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What is checked of distributions, a script and no module of a package.
spec = importlib.util.spec_from_file_location("distributions", ROOT / ".ci" / "distributions.py")
assert spec is not None
assert spec.loader is not None
distributions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distributions)

SOURCES = ["jaxkv/__init__.py", "jaxkv/_xla/access.py", "torchkv/__init__.py", "kvcore/__init__.py"]
WHEEL = [
    *SOURCES,
    *(f"{package}/py.typed" for package in ("jaxkv", "torchkv", "kvcore")),
    *(f"jaxkv-1.0.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")),
]
SOURCE = [
    f"jaxkv-1.0/{name}"
    for name in (
        "PKG-INFO",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        ".ci/run",
        "tests/conftest.py",
        "jaxkv/__init__.py",
    )
]


def test_a_right_wheel():
    assert distributions.faults_of_wheel(WHEEL, SOURCES, "1.0") == []


@pytest.mark.parametrize("name", [*SOURCES, "torchkv/py.typed", "jaxkv-1.0.dist-info/licenses/LICENSE"])
def test_what_a_wheel_lacks(name):
    assert distributions.faults_of_wheel({*WHEEL} - {name}, SOURCES, "1.0") == [f"missing: {name}"]


@pytest.mark.parametrize(
    "name", ["tests/conftest.py", "jaxkv/notes.md", "uv.lock", "jaxkv/__pycache__/x.pyc", "kvcore.pth"]
)
def test_what_a_wheel_should_not_have(name):
    assert distributions.faults_of_wheel([*WHEEL, name], SOURCES, "1.0") == [f"not wanted: {name}"]


def test_source_distribution():
    assert distributions.faults_of_source(SOURCE, "1.0") == []
    assert distributions.faults_of_source(SOURCE[1:], "1.0") == ["missing: PKG-INFO"]
    assert distributions.faults_of_source([*SOURCE, "jaxkv-1.0/uv.lock"], "1.0") == ["not wanted: uv.lock"]


def test_page_of_an_index():
    page = (
        '<h2 id="user-content-jax">JAX</h2><a href="#user-content-jax">JAX</a><a href="https://just.systems">just</a>'
    )
    assert distributions.faults_of_page(page) == []
    assert distributions.faults_of_page(f'{page}<img src="docs/x.svg">') == ["leads nowhere: docs/x.svg"]
    assert distributions.faults_of_page(f'{page}<a href="#user-content-torch">') == [
        "leads nowhere: #user-content-torch"
    ]
    assert distributions.faults_of_page(None) == ["README is not rendered"]


def test_wheel_and_licence_of_this_project_are_what_is_asked_for():
    assert [package for package in distributions.PACKAGES if not (ROOT / package / "py.typed").is_file()] == []
    assert PROJECT["license-files"] == ["LICENSE"]


def test_the_script_is_bash_and_takes_no_other_options():
    subprocess.run(["bash", "-n", ".ci/release"], cwd=ROOT, check=True)
    for options in (["--publish"], ["--tag"]):
        done = subprocess.run(["bash", ".ci/release", *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0
        assert "usage:" in done.stderr or "--tag needs a tag" in done.stderr


def test_every_python_that_is_said_to_work_is_tried():
    default = re.search(r"\$\{PYTHONS:-([\d. ]+)\}", SCRIPT)
    assert default is not None
    said = {c.rpartition(" :: ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert said
    assert said <= {*default[1].split()}


def test_only_a_tag_publishes_and_only_what_was_built():
    triggers = WORKFLOW[True]  # YAML's `on`
    assert triggers == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}
    build, publish = WORKFLOW["jobs"]["build"], WORKFLOW["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["if"] == "github.event_name == 'push' && startsWith(github.ref, 'refs/tags/v')"
    assert publish["environment"] == "release"
    assert publish["permissions"] == {"id-token": "write"}
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in build
    assert 'bash .ci/release --torch --tag "$TAG"' in [step.get("run") for step in build["steps"]]
    actions = [step["uses"].partition("@")[0] for step in publish["steps"]]
    assert actions == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
    artifacts = [
        step["with"]["name"] for job in (build, publish) for step in job["steps"] if "artifact" in step.get("uses", "")
    ]
    assert artifacts == ["dist", "dist"]
    assert not any("password" in step.get("with", {}) for step in publish["steps"])
