"""The package's page on an index: README.md, without links and pictures that lead nowhere from there.

Links of README.md lead into the repository. On an index's page, or in the metadata of what is installed, they would be
dead: there the file's name stands behind the text instead. All else is said in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(r"!\[([^\]]*)\]\((?![a-z]+:)[^)\s]+\)")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)[^)\s]*\)")
_NOTE = "Files in brackets: those of `ucp/` are in the installed package, all others in the repository.\n\n"


def page(text: str) -> str:
    """The Markdown with names of files where it has relative links, and a picture's words for the picture."""
    parts = _FENCED.split(text)  # every second one is a block of code
    for at in range(0, len(parts), 2):
        parts[at] = _LINK.sub(_named, _PICTURE.sub(r"*\1*", parts[at]))
    title, _, rest = "".join(parts).partition("\n\n")
    return f"{title}\n\n{_NOTE}{rest}"


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    if (README.parent / "ucp" / path).exists():  # the package has the catalogue of specs, which stands beside it here
        path = f"ucp/{path}"
    own = path.removesuffix("/README.md")
    return f"`{path}`" if text in (own, own.removeprefix("ucp/"), path) else f"{text} (`{path}`)"


if __name__ == "__main__":
    setup(long_description=page(README.read_text(encoding="utf-8")), long_description_content_type="text/markdown")
