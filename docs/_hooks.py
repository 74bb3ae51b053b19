"""What the site's build does beyond MkDocs: links that lead out of docs/, pages made of other files, llms.txt.

Pages are written to be read in the repository, too. So they link to files beside docs/, and name pages as
`docs/NAME.md`; here both become links within the site. `python docs/_hooks.py` writes `docs/llms.txt` anew.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent
ROOT = DOCS.parent

PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are other files of the repository."""

FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2`*[ ]*$", re.M | re.S)
HIDDEN = re.compile(r"^ *<!-- (?:run$.*?^ *-->|not run:.*?-->)\n?", re.M | re.S)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
NAMED = re.compile(r"(?<!\[)`((?:docs/[\w./-]+|CONTRIBUTING|CHANGELOG)\.md)`(?!\])")


# ---- MkDocs calls these


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages made of other files, and the files that pages link to."""
    from mkdocs.structure.files import File, InclusionLevel

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for path in sorted(linked()):
        text = path.read_text() if path.suffix == ".json" else listing(path)
        files.append(File.generated(config, address(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page as the site has it: without hidden code, and with links that stay within the site."""
    return for_site(markdown, page.file.src_uri)


def on_post_build(config: Any) -> None:
    """Writes llms-full.txt: all pages in one."""
    texts = [for_site(source_of(page).read_text(), page).strip() for page in pages(config["nav"])]
    (Path(config["site_dir"]) / "llms-full.txt").write_text("\n\n".join(texts) + "\n")


# ---- links


def source_of(page: str) -> Path:
    """The file that a page of the site is made of."""
    return ROOT / PAGES[page] if page in PAGES else DOCS / page


def address(path: Path) -> str:
    """Where the site has a file from outside docs/."""
    name = path.relative_to(ROOT).as_posix()
    return name if path.suffix == ".json" else f"{name}.md"


def listing(path: Path) -> str:
    """A page with a file's text."""
    name = path.relative_to(ROOT).as_posix()
    return f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n````{path.suffix[1:]}\n{path.read_text()}````\n"


def targets(text: str, folder: Path) -> Iterator[Path]:
    """Files of the repository that a text links to."""
    for _, link in LINK.findall(FENCED.sub("", text)):
        if not re.match(r"[a-z]+:|#", link):
            yield (folder / link.partition("#")[0]).resolve()


def linked() -> set[Path]:
    """Files outside docs/ that pages link to, but those that are pages themselves."""
    sources = [*DOCS.rglob("*.md"), *(ROOT / source for source in PAGES.values())]
    found = {path for source in sources for path in targets(source.read_text(), source.parent)}
    made = {ROOT / source for source in PAGES.values()}
    made.add(ROOT / "README.md")  # whose place is index.md's
    return {path for path in found - made if path.is_file() and ROOT in path.parents and DOCS not in path.parents}


def for_site(text: str, page: str) -> str:
    """A page's text with the site's links; what is in fences stays as it is."""
    text = HIDDEN.sub("", text)
    source, folder = source_of(page), posixpath.dirname(page)
    pages_made = {ROOT / made: name for name, made in PAGES.items()}

    def to(path: Path) -> str | None:
        if path == ROOT / "README.md":
            found = "index.md"
        elif path in pages_made:
            found = pages_made[path]
        elif DOCS in path.parents:
            found = path.relative_to(DOCS).as_posix()
        elif path.is_file() and ROOT in path.parents:
            found = address(path)
        else:
            return None
        return posixpath.relpath(found, folder or ".")

    def link(match: re.Match[str]) -> str:
        words, link = match.groups()
        if re.match(r"[a-z]+:|#|/", link):
            return match[0]
        name, hash_, anchor = link.partition("#")
        path = (source.parent / name).resolve()
        found = to(path)
        if found is None and path.is_dir():
            return words[1:-1]  # a folder has no page
        if name.endswith("README.md"):
            hash_, anchor = "", ""
        return match[0] if found is None else f"{words}({found}{hash_}{anchor})"

    def named(match: re.Match[str]) -> str:
        path = ROOT / match[1]
        found = to(path) if path.is_file() else None
        return match[0] if found is None or path == source else f"[{match[0]}]({found})"

    def outside(part: str) -> str:
        return NAMED.sub(named, LINK.sub(link, part))

    parts, end = [], 0
    for fence in FENCED.finditer(text):
        parts += [outside(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, outside(text[end:])])


# ---- llms.txt


def pages(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def about(page: str) -> tuple[str, str]:
    """A page's title, and the first sentence below it."""
    text = FENCED.sub("", HIDDEN.sub("", source_of(page).read_text()))
    title = re.search(r"^# (.*)$", text, re.M)
    assert title is not None, f"{page} must have a title"
    paragraph = re.search(r"^[^\s#:|<!>-].*?(?=\n\n|\Z)", text[title.end() :], re.M | re.S)
    words = " ".join(paragraph[0].split()) if paragraph else ""
    words = LINK.sub(lambda match: match[1][1:-1], words).replace("**", "")
    sentence = re.match(r".*?[.:](?=\s|$)", words)
    return title[1].replace("`", ""), (sentence[0] if sentence else words).rstrip(".:")


def llms(nav: list[Any], name: str, description: str) -> str:
    """The site's pages for language models: title, link, and a line on each (llmstxt.org)."""
    lines = [f"# {name}", "", f"> {description}"]
    for part in nav:
        ((section, found),) = part.items()
        if isinstance(found, str):
            lines += [""]
        else:
            lines += ["", f"## {section}", ""]
        for page in pages(found):
            title, sentence = about(page)
            lines.append(f"- [{title}]({page.removesuffix('.md')}.html)" + (f": {sentence}" if sentence else ""))
    return "\n".join([*lines, "", "All pages in one: [llms-full.txt](llms-full.txt)"]) + "\n"


def llms_of_project() -> str:
    """What `docs/llms.txt` must be."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    return llms(settings["nav"], settings["site_name"], settings["site_description"])


if __name__ == "__main__":
    (DOCS / "llms.txt").write_text(llms_of_project())
