"""A built package's page as an index shows it: ``python -m tests.rendering FILE``; readme_renderer[md] is on the path.

`twine check` does not look at Markdown. This renders the description in the package's own metadata with what the index
renders it with, and compares: every heading, table, block of code and picture has to come out as one.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def description(built: Path) -> str:
    """The long description of a wheel or sdist."""
    if built.suffix == ".whl":
        with zipfile.ZipFile(built) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            raw = wheel.read(name)
    else:
        with tarfile.open(built) as sdist:
            (name,) = (name for name in sdist.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", name))
            raw = sdist.extractfile(name).read()  # type: ignore[union-attr]
    said = message_from_bytes(raw)
    if said.get_content_type() != "text/plain" and said["Description-Content-Type"] != "text/markdown":
        raise SystemExit(f"{built}: its description is {said['Description-Content-Type']}, not Markdown")
    return said.get_payload(decode=True).decode("utf-8")  # type: ignore[union-attr]


def faults(text: str, render: Callable[[str], str | None]) -> list[str]:
    """What of the Markdown does not come out. render: to HTML, or None if it can't."""
    page = render(text)
    if page is None:
        return ["it is not rendered at all"]
    plain = _FENCED.sub("", text)
    wanted = {
        "headings": (len(re.findall(r"^#{1,6} ", plain, re.MULTILINE)), r"<h[1-6]\b"),
        "tables": (len(re.findall(r"^\|(?: ?:?-+:? ?\|)+$", plain, re.MULTILINE)), r"<table\b"),
        "blocks of code": (len(_FENCED.findall(text)), r"<pre\b"),
        "pictures": (len(re.findall(r"!\[", plain)), r"<img\b"),
    }
    out = []
    for what, (count, tag) in wanted.items():
        found = len(re.findall(tag, page))
        if found != count:
            out.append(f"{found} of {count} {what} come out")
    return out


def relative_links(text: str) -> list[str]:
    """Links into the repository, which lead nowhere from an index's page."""
    found = re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", text))
    return sorted({link for link in found if not re.match(r"[a-z]+:|#", link)})


if __name__ == "__main__":
    from readme_renderer import markdown  # type: ignore[import-not-found]

    for file in map(Path, sys.argv[1:]):
        told = description(file)
        if found := faults(told, markdown.render):
            raise SystemExit(f"{file}: its page is not what README.md says: {'; '.join(found)}")
        if links := relative_links(told):
            raise SystemExit(f"{file}: {len(links)} links lead nowhere from an index's page ({links[0]}, …)")
