"""What the distribution says of itself, and what is said where something that it does not bring is missing."""

import re
import shlex
import tomllib
from importlib import metadata

import pytest
import yaml

import jaxkv
import kvcore
import torchkv
from tests.cases.processes import JAX_WRITE, ROOT, TORCH_WRITE, packages, run

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")),
]


def refused(code, error, hidden):
    """The message of the error that code ends with, in a process without the hidden packages."""
    indented = code.strip().replace("\n", "\n    ")
    code = (
        f"try:\n    {indented}\nexcept {error} as error:\n    print('message:', error)\nelse:\n    raise SystemExit(1)"
    )
    return run(code, hidden, text=True).partition("message: ")[2].splitlines()[0]


@pytest.mark.parametrize("package", [jaxkv, torchkv, kvcore], ids=lambda package: package.__name__)
def test_version_is_the_distributions(package):
    assert package.__version__ == metadata.version("jaxkv") == PROJECT["version"]
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'versoin'"):
        _ = package.versoin


@pytest.mark.parametrize("package", ["jaxkv", "torchkv", "kvcore"])
def test_version_of_a_copy_that_was_not_installed_is_no_attribute(package):
    code = f"""
from importlib import metadata
def missing(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = missing
import {package}
assert not hasattr({package}, "__version__")
"""
    run(code)


def test_changelog_has_the_version():
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text().replace("## [Unreleased]", ""), re.M)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


def test_licence_is_a_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "LICENSE" in PROJECT["license-files"]
    for part in (
        "Version 2.0, January 2004",
        "1. Definitions.",
        "9. Accepting Warranty",
        "END OF TERMS AND CONDITIONS",
    ):
        assert part in text


def test_readme_links_to_nothing_that_only_a_clone_has():
    # An index shows README without the files beside it, and there is no address of a repository to link to.
    links = re.findall(r"\]\((.*?)\)", (ROOT / "README.md").read_text())
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)


PATH = re.compile(
    r"(?:(?:kvcore|jaxkv|torchkv|tests|benchmarks|docs|examples|\.ci|\.github)/[\w./-]*|[\w.-]+\.(?:md|toml|yaml))"
)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page):
    text = (ROOT / page).read_text()
    names = [name for name in re.findall(r"`([^`\n]+)`", text) if PATH.fullmatch(name)]
    prose = re.sub(r"```.*?```|`[^`\n]+`", "", text, flags=re.S)
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https:|#)(.*?)\)", prose)]
    assert names or links or page.startswith("docs/")
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_contributing_maps_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^([\w./]+)/ +\w", text, re.M)
    packages = [ROOT / name for name in ("kvcore", "jaxkv", "torchkv")]
    inside = [
        file.parent.relative_to(ROOT).as_posix() for package in packages for file in package.glob("*/__init__.py")
    ]
    assert sorted(named) == sorted(
        [*inside, "kvcore", "jaxkv", "torchkv", "tests", "benchmarks", "examples", "docs", ".ci"]
    )


def test_source_distribution_has_what_it_lists():
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [name for name in included if not (ROOT / name).exists()] == []
    assert {
        "justfile",
        "mkdocs.yml",
        ".pre-commit-config.yaml",
        "LICENSE",
        *PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"],
    } <= {*included}


@pytest.mark.parametrize(
    ("workflow", "command"), [("ci", "bash .ci/run"), ("newest", "bash .ci/compiled"), ("release", "bash .ci/release")]
)
def test_workflows_run_scripts_that_anybody_can_run(workflow, command):
    text = (ROOT / f".github/workflows/{workflow}.yml").read_text()
    yaml.safe_load(text)
    assert command in text
    assert (ROOT / command.split()[1]).is_file()


# ---- commands that people run

TOOLS = {re.split(r"[>=]", need)[0] for need in PYPROJECT["dependency-groups"]["dev"] if isinstance(need, str)}


def recipes():
    """Names and lines of the justfile's recipes."""
    text = (ROOT / "justfile").read_text()
    found = re.findall(r"^([a-z-]+)((?: \*?\w+)*):\n((?:    .*\n)+)", text, re.M)
    return {name: lines.split("\n")[:-1] for name, _, lines in found}


def test_contributing_names_every_recipe():
    named = re.findall(r"`just ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text())
    assert {*named} == {*recipes()} == {"setup", "test", "test-file", "lint", "docs", "gpu", "release", "benchmark"}


@pytest.mark.parametrize("line", [line.strip() for lines in recipes().values() for line in lines])
def test_recipes_run_what_there_is(line):
    uv, command, *words = shlex.split(line)
    if uv == "bash":
        assert (ROOT / command).is_file()
        return
    assert uv == "uv"
    if command == "sync":
        assert words == []
        return
    assert command == "run"
    tools = TOOLS
    if words[0] == "--extra":
        assert words[1] in PROJECT["optional-dependencies"]
        words = words[2:]
    if words[0] == "--group":
        tools = {re.split(r"[>=<\[]", need)[0] for need in PYPROJECT["dependency-groups"][words[1]]}
        words = words[2:]
    tool, *words = words
    if tool == "python" and words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        return
    if tool == "python":
        assert (ROOT / words[1] / "__main__.py").is_file()
        return
    assert tool in tools
    if tool == "pytest" and "-m" in words:
        markers = PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
        assert words[words.index("-m") + 1] in {marker.partition(":")[0] for marker in markers}


def test_hooks_run_the_projects_own_tools():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        if hook["language"] == "system":
            assert hook["entry"].startswith("uv run --no-sync ")
            assert hook["entry"].split()[3] in TOOLS
        else:
            assert hook["language"] == "pygrep"
            re.compile(hook["entry"])


def test_triton_comes_with_extras_only():
    extras = PROJECT["optional-dependencies"]
    assert PROJECT["dependencies"] == ["numpy>=2.0"]
    assert not any("triton" in requirement for requirement in extras["jax"])
    for extra in ("triton", "torch"):
        assert any(requirement.startswith("triton") for requirement in extras[extra])
    assert "jaxkv[triton]" in extras["cuda13"]


# --- What is missing ------------------------------------------------------------------------------

TRITON = (
    "Triton is not installed, and its kernels are what runs on CUDA and ROCm devices and with backend 'interpret': "
    "install jaxkv[cuda13] for JAX on an NVIDIA GPU, jaxkv[triton] beside a JAX of your own, jaxkv[torch] for torch"
)
JAX_TRITON = (
    "jax-triton is not installed, and JAX starts Triton's kernels with it on CUDA and ROCm devices: "
    "install jaxkv[cuda13] for JAX on an NVIDIA GPU, jaxkv[triton] beside a JAX of your own"
)


def test_jaxkv_without_jax_names_the_extra():
    message = "jax is not installed, and jaxkv needs it: install jaxkv[jax], or jaxkv[cuda13] for an NVIDIA GPU"
    assert refused("import jaxkv", "ModuleNotFoundError", {"jax"}) == message


def test_torchkv_without_torch_names_the_extra():
    message = "torch is not installed, and torchkv needs it: install jaxkv[torch]"
    assert refused("import torchkv", "ModuleNotFoundError", {"torch"}) == message


@pytest.mark.parametrize("package", ["jax", "torch"])
def test_a_framework_that_is_broken_is_not_called_missing(package):
    code = f"import {package}kv"
    missing = {"jax": "ml_dtypes", "torch": "typing_extensions"}[package]
    message = refused(code, "ModuleNotFoundError", {missing})
    assert message.startswith(f"No module named '{missing}")


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize(("hidden", "message"), [("triton", TRITON), ("jax_triton", JAX_TRITON)])
@pytest.mark.parametrize("op", ["write", "attend", "gather"])
def test_jax_on_a_gpu_without_triton_is_an_error_and_no_slow_path(op, hidden, message, platform):
    code = f"""
import jax, jax.numpy as jnp, jaxkv
cache = jaxkv.PagedKVCache.create(num_blocks=3, block_size=4, num_heads=2, head_size=8)
row, tables, lengths = jnp.ones((1, 2, 8)), jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
ops = {{
    "write": lambda cache: cache.write(row, row, lengths),
    "attend": lambda cache: cache.attend(row, tables, lengths),
    "gather": lambda cache: cache.gather(tables, lengths, 4),
}}
jax.jit(ops[{op!r}]).trace(cache).lower(lowering_platforms=({platform!r},))
"""
    assert refused(code, "ModuleNotFoundError", {hidden}) == message


def test_interpreting_without_triton_names_the_extra():
    for code in (
        "import jaxkv" + JAX_WRITE.replace("]))", ']), backend="interpret")'),
        "import torchkv" + TORCH_WRITE.replace("[5]))", '[5]), backend="interpret")'),
    ):
        assert code.count("interpret") == 1
        assert refused(code, "ModuleNotFoundError", {"triton"}) == TRITON


def test_torch_on_a_gpu_without_triton_names_the_extra():
    for name in ("load(None, {}, frozenset())", "target()"):
        code = f"from torchkv._triton import launch\nlaunch.{name}"
        assert refused(code, "ModuleNotFoundError", {"triton"}) == TRITON


def test_jaxkv_on_a_cpu_imports_only_what_its_extra_brings():
    modules = run("import jaxkv" + JAX_WRITE, {"triton", "jax_triton", "torch", "torchkv"})
    assert not packages(modules) & {"gguf", "tokenizers", "transformers", "jinja2"}
