"""What a release's check of the page finds, with renderers that leave something out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.rendering import faults, relative_links

TEXT = """# One

| a | b |
|---|---|
| 1 | 2 |

```bash
# no heading
| --- |
```

![A picture](folder/picture.png) and [a link](folder/README.md#part), [another](https://example.org), [here](#one).
"""
PAGE = "<h1>One</h1> <table></table> <pre></pre> <img>"


@pytest.mark.parametrize(
    ("render", "found"),
    [
        (lambda text: PAGE, []),
        (lambda text: None, ["it is not rendered at all"]),
        (lambda text: PAGE.replace("<table></table>", "|---|"), ["0 of 1 tables come out"]),
        (lambda text: PAGE.replace("<img>", ""), ["0 of 1 pictures come out"]),
        (lambda text: PAGE + "<h1>no heading</h1>", ["2 of 1 headings come out"]),
        (lambda text: PAGE.replace("pre>", "p>"), ["0 of 1 blocks of code come out"]),
    ],
)
def test_what_does_not_come_out_is_named(render: Callable[[str], str | None], found: list[str]) -> None:
    assert faults(TEXT, render) == found


def test_links_that_lead_nowhere_from_an_index() -> None:
    assert relative_links(TEXT) == ["folder/README.md#part", "folder/picture.png"]
