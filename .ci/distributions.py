"""What is in the distributions, and how an index shows README.

`python .ci/distributions.py FOLDER [TAG]`; .ci/release runs it.
"""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxkv", "torchkv", "kvcore")


def faults_of_wheel(names: Iterable[str], sources: Iterable[str], version: str) -> list[str]:
    """What the files of a wheel should be and are not; `sources` are the modules of the tree that it was built of."""
    names, about = set(names), f"jaxkv-{version}.dist-info"
    allowed = re.compile(rf"(?:{'|'.join(PACKAGES)})/(?:[\w/]+\.py|py\.typed)|{re.escape(about)}/.+")
    wanted = {*sources, *(f"{package}/py.typed" for package in PACKAGES), f"{about}/licenses/LICENSE"}
    return [f"missing: {name}" for name in sorted(wanted - names)] + [
        f"not wanted: {name}" for name in sorted(names) if not allowed.fullmatch(name)
    ]


def faults_of_source(names: Iterable[str], version: str) -> list[str]:
    """What the files of a source distribution should be and are not."""
    top = f"jaxkv-{version}/"
    names = {name.removeprefix(top) for name in names}
    wanted = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".ci/run", "tests/conftest.py"}
    return [f"missing: {name}" for name in sorted(wanted - names)] + [
        f"not wanted: {name}"
        for name in sorted(names)
        if name.startswith("/") or re.search(r"__pycache__|\.venv|\.lock$", name)
    ]


def faults_of_page(html: str | None) -> list[str]:
    """Links and pictures of a rendered README that lead nowhere on an index."""
    if not html:
        return ["README is not rendered"]
    targets = re.findall(r'(?:href|src)="([^"]*)"', html)
    anchors = {f"#{name}" for name in re.findall(r'id="([^"]*)"', html)}
    return [
        f"leads nowhere: {target}" for target in targets if not target.startswith("https://") and target not in anchors
    ]


def main(folder: str, tag: str = "") -> None:
    """Looks at the distributions in the folder, built of the last commit. Ends with their faults, if there are any."""
    from readme_renderer import markdown  # type: ignore[import-not-found]

    (wheel,), (source,) = Path(folder).glob("jaxkv-*.whl"), Path(folder).glob("jaxkv-*.tar.gz")
    version = wheel.name.split("-")[1]
    listing = ["git", "ls-tree", "-r", "--name-only", "HEAD", *PACKAGES]
    sources = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = email.message_from_bytes(archive.read(f"jaxkv-{version}.dist-info/METADATA"))
    with tarfile.open(source) as archive:
        members = archive.getnames()
    faults = [f"the wheel: {fault}" for fault in faults_of_wheel(names, sources, version)]
    faults += [f"the source distribution: {fault}" for fault in faults_of_source(members, version)]
    faults += [f"README: {fault}" for fault in faults_of_page(markdown.render(about.get_payload(decode=True).decode()))]
    if tag and tag != f"v{version}":
        faults.append(f"the tag must be v{version}, got {tag}")
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(names)} files in the wheel, {len(members)} in the source distribution, version {version}")


if __name__ == "__main__":
    main(*sys.argv[1:])
