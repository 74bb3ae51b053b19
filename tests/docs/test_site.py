"""The site: its navigation, its API pages, links that lead out of docs/, llms.txt. CI builds it: see `.ci/run`."""

import importlib.util
import inspect
import re

import pytest
import yaml

import jaxkv
import torchkv
from tests.cases.pages import ROOT, page_names

spec = importlib.util.spec_from_file_location("_hooks", ROOT / "docs" / "_hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_the_navigation_has_every_page_once():
    wanted = [name.removeprefix("docs/") for name in page_names() if name.startswith("docs/")]
    assert sorted(hooks.pages(SETTINGS["nav"])) == sorted([*wanted, *hooks.PAGES])


def test_llms_txt_is_of_these_pages():
    assert (ROOT / "docs" / "llms.txt").read_text() == hooks.llms_of_project(), "run: python docs/_hooks.py"


def test_llms_txt_has_a_line_for_a_page():
    nav = [{"Home": "index.md"}, {"Guides": [{"Several devices": "devices.md"}]}]
    assert hooks.llms(nav, "Name", "What it is").splitlines() == [
        "# Name", "", "> What it is", "", f"- [{hooks.about('index.md')[0]}](index.html): {hooks.about('index.md')[1]}",
        "", "## Guides", "", "- [Several devices](devices.html): " + hooks.about("devices.md")[1], "",
        "All pages in one: [llms-full.txt](llms-full.txt)",
    ]  # fmt: skip


def test_every_picture_is_on_a_page():
    shown = {path for name in page_names() for path in hooks.targets((ROOT / name).read_text(), (ROOT / name).parent)}
    pictures = {*(ROOT / "docs").rglob("*.svg"), *(ROOT / "docs").rglob("*.png")}
    assert pictures
    assert pictures <= shown


# ---- the API pages


def shown(page):
    """Names that a page of docs/api shows, or links to on the page of what both packages share."""
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    return re.findall(r"^::: ([\w.]+)", text, re.M), re.findall(r"\]\[kvcore\.([\w.]+)\]", text)


@pytest.mark.parametrize("package", [jaxkv, torchkv], ids=lambda package: package.__name__)
def test_every_public_name_is_on_a_page(package):
    own, both = shown(package.__name__)
    assert sorted([*own, *(f"{package.__name__}.{name.rpartition('.')[2]}" for name in both)]) == sorted(
        f"{package.__name__}.{name}" for name in package.__all__
    )
    assert {f"kvcore.{name}" for name in both} <= {*shown("both")[0]}


@pytest.mark.parametrize("package", [jaxkv, torchkv], ids=lambda package: package.__name__)
def test_every_method_of_a_cache_is_on_its_page(package):
    text = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text()
    options = re.search(r"^::: \w+\.PagedKVCache\n((?:    .*\n)+)", text, re.M)
    fields = {"caches", "spec", "k_scale", "v_scale"}  # their docstring is the class's
    names = {name for name, _ in inspect.getmembers(package.PagedKVCache) if not name.startswith("_")}
    members = yaml.safe_load(options[1])["options"]["members"]
    assert sorted(members) == sorted(names - fields)


def test_results_have_their_type_whatever_colons_are_in_the_text():
    griffe = pytest.importorskip("griffe")
    options = SETTINGS["plugins"][1]["mkdocstrings"]["handlers"]["python"]["options"]["docstring_options"]
    extensions = griffe.load_extensions(str(ROOT / "docs" / "_docstrings.py") + ":Docstrings")
    found = {}
    for name in ("jaxkv.read", "kvcore.batch"):
        module = griffe.load(name, search_paths=[ROOT], allow_inspection=False, extensions=extensions)
        for function in module.functions.values():
            for section in function.docstring.parse("google", **options) if function.docstring else ():
                if section.kind is griffe.DocstringSectionKind.returns:
                    (item,) = section.value
                    assert str(item.annotation) == str(function.returns)
                    found[function.name] = item.description
    assert found["gather_kv"].startswith("Key `[num_seqs, max_len, num_heads, head_size]` and value `")
    assert found["ragged_batch"] == "The arrays, padded to the sizes that are given."


@pytest.mark.parametrize("page", ["both", "integrations"])
def test_what_a_page_shows_is_there(page):
    names = shown(page)[0]
    assert len(names) > 8
    for name in names:
        module, _, last = name.rpartition(".")
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), last)
        assert page == "both" or found.__doc__


# ---- links


@pytest.mark.parametrize(
    ("text", "page", "want"),
    [
        ("[a](devices.md#torch)", "flax.md", "[a](devices.md#torch)"),
        ("[a](../devices.md)", "api/jaxkv.md", "[a](../devices.md)"),
        ("[a](../benchmarks/results/slots-h100.json))", "flax.md", "[a](benchmarks/results/slots-h100.json))"),
        ("[a](../examples/one_buffer.py)", "flax.md", "[a](examples/one_buffer.py.md)"),
        ("[a](../../examples/one_buffer.py)", "api/both.md", "[a](../examples/one_buffer.py.md)"),
        ("[`examples/`](../examples/llama) do", "accuracy.md", "`examples/` do"),
        ("[a](docs/design.md) [b](README.md#install)", "contributing.md", "[a](design.md) [b](index.md)"),
        ("[a](../CONTRIBUTING.md#changes)", "design.md", "[a](contributing.md#changes)"),
        ("as `docs/devices.md` says", "api/both.md", "as [`docs/devices.md`](../devices.md) says"),
        ("as `docs/flax.md` and `docs/none.md` say", "flax.md", "as `docs/flax.md` and `docs/none.md` say"),
        ("[`docs/a.md`](flax.md) `CHANGELOG.md`", "design.md", "[`docs/a.md`](flax.md) [`CHANGELOG.md`](changelog.md)"),
        ("[a](https://x.y/z.md) [b](#c) ![d](attention.svg)", "benchmarks.md", None),
        ("```text\n[a](../examples/one_buffer.py)\n```\n", "flax.md", None),
        ("a\n<!-- run\nx = 1\n-->\n<!-- not run: why -->\nb", "flax.md", "a\nb"),
    ],
)  # fmt: skip
def test_links_stay_within_the_site(text, page, want):
    assert hooks.for_site(text, page) == (text if want is None else want)


def test_files_that_pages_link_to_are_on_the_site():
    found = {hooks.address(path) for path in hooks.linked()}
    assert {"benchmarks/results/write-h100.json", "examples/flax_decoder.py.md"} <= found
