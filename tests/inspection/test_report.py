"""The report: its numbers are inspect's, it needs nothing but itself, and a real browser shows it without complaint."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ucp
from tests.formats import raw
from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, SourceFile, TrainingState
from ucp.checkpoint import Checkpoint
from ucp.geometry import whole
from ucp.inspection import display
from ucp.inspection.planning import plan
from ucp.inspection.report import render, write_report
from ucp.inspection.report.data import report_data
from ucp.inspection.report.maps import rectangles
from ucp.inspection.summary import summarise
from ucp.inspection.verify import Verdict
from ucp.parallel.mesh import Layout, parse_layout
from ucp.parallel.zero import ceil_partition
from ucp.storage import metrics
from ucp.storage.files import Files
from ucp.units import bytes_text

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def browser() -> str:
    """A browser, looked for when a test wants it: `.ci/run` installs one beside the tests, and a half of it is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no chromium is installed")
    if shutil.which("dpkg-query"):
        asked = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", os.path.basename(found)]
        status = subprocess.run(asked, capture_output=True, text=True, check=False)
        if status.returncode == 0 and status.stdout not in ("installed", "not-installed"):
            pytest.skip(f"chromium is being installed ({status.stdout})")
    return found


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def rendered(browser: str, page: Path, script: str) -> tuple[Any, list[str]]:
    """What a script in the page returns once it is loaded, and everything that the browser's console was told."""
    watch = "<script>window.told=[];addEventListener('error',e=>told.push(String(e.message)));"
    watch += "for(const k of ['error','warn'])console[k]=(...a)=>told.push(a.join(' '));"
    watch += "addEventListener('securitypolicyviolation',e=>told.push('policy '+e.violatedDirective));</script>"
    ask = f"<script>addEventListener('load',()=>{{const found=(()=>{{{script}}})();"
    ask += "const out=document.createElement('pre');out.id='result';"
    ask += "out.textContent=JSON.stringify([found,told]);document.body.append(out);});</script>"
    text = page.read_text(encoding="utf-8")
    copy = page.with_name("asked.html")
    copy.write_text(text.replace("<body>", f"<body>{watch}", 1).replace("</body>", f"{ask}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1200,1600",
            f"--user-data-dir={page.parent / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (found,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    result, told = json.loads(html.unescape(found))
    return result, told


@pytest.fixture
def report(tmp_path: Path, virtual: Path) -> Path:
    metrics.append(
        virtual.parent,
        {
            "what": "save",
            "id": "1",
            "checkpoint": str(virtual),
            "rank": 0,
            "world": 2,
            "seconds": {"write": 1.5, "wait": 7.75},
        },
    )
    metrics.append(
        virtual.parent,
        {"what": "save", "id": "1", "checkpoint": str(virtual), "rank": 1, "world": 2, "seconds": {"write": 9.25}},
    )
    write_report(virtual, tmp_path / "report.html", layout=parse_layout("dp=2,zero=3"))
    return tmp_path / "report.html"


def test_the_numbers_are_those_of_inspect(report: Path, virtual: Path) -> None:
    data = data_of(report)
    with ucp.open(virtual) as checkpoint:
        summary = json.loads(json.dumps(summarise(checkpoint).as_json()))
    for key in ("format", "layout", "step", "elements", "bytes", "file_bytes", "fragments", "states", "holders"):
        assert data["summary"][key] == summary[key]
    columns = data["parameters"]
    for k, entry in enumerate(summary["parameters"]):
        for key in ("name", "shape", "kind", "elements", "bytes", "cut"):
            assert columns[key][k] == entry[key]
        states = columns["state_sets"][columns["states"][k]]
        assert states == [[name, s["dtype"], s["fragments"]] for name, s in entry["states"].items()]
        drawn = columns["maps"][columns["map"][k]]
        boxes = np.array(drawn["boxes"], np.int64).reshape(-1, 7)
        assert (boxes[:, 1] * boxes[:, 3]).sum() == entry["elements"]
        assert boxes[:, 6].sum() == drawn["fragments"] == entry["states"]["param"]["fragments"]
    plan = data["plan"]
    assert sum(map(sum, plan["matrix"])) == plan["bytes"] == sum(plan["rank_bytes"])
    assert [t["rank"] for t in data["timings"]] == [0, 1]


def test_it_needs_nothing_but_itself(report: Path) -> None:
    text = report.read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    assert not re.search(r"<(?:img|link|script)[^>]+(?:src|href)=\"(?!data:)", text)


def test_names_can_do_no_harm(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><!--.weight"
    made = raw.make(tmp_path / "raw", shapes={name: (3, 2)})
    write_report(raw.virtual_checkpoint(tmp_path / "v", made), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "alert(1)</script>" not in text
    assert name in data_of(tmp_path / "r.html")["parameters"]["name"]


def test_a_damaged_checkpoint_has_a_report_too(tmp_path: Path, consolidated: Path) -> None:
    (consolidated / "model-00001-of-00001.safetensors").unlink()
    written = write_report(consolidated, tmp_path / "r.html")
    assert not written.whole
    data = data_of(tmp_path / "r.html")
    assert data["summary"] is None
    assert [f["kind"] for f in data["verdict"]["findings"]] == ["file"]


def test_many_fragments_are_few_rectangles() -> None:
    blocks = ceil_partition((1000, 300), 0, 5000)
    drawn = rectangles((1000, 300), blocks, blocks.buffers)
    boxes = np.array(drawn["boxes"]).reshape(-1, 7)
    assert len(boxes) == limits.MAP_RECTANGLES_COUNT
    assert boxes[:, 6].sum() == drawn["fragments"] == len(blocks)
    assert boxes[0, 4] == 0
    assert boxes[-1, 5] == 4999
    ends = boxes[:, 0] + boxes[:, 1]
    assert np.all(boxes[1:, 0] <= ends[:-1])  # nothing between them is left out
    assert ends[-1] == 1000


def many(parameters: int, ranks: int) -> Checkpoint:
    """A stage-3 checkpoint of so many, without files."""
    files = tuple(
        SourceFile(f"/run/step1/zero_pp_rank_{r}_mp_rank_00_optim_states.pt", 1 << 40, 0) for r in range(ranks)
    )
    shapes = {f"model.layers.{k // 4}.{'qkvo'[k % 4]}.weight": (512, 64 * (1 + k % 4)) for k in range(parameters)}
    cuts = {shape: ceil_partition(shape, 0, ranks) for shape in set(shapes.values())}
    tensors = {
        (name, state): LogicalTensor(name, state, s, "float32", cuts[s], np.zeros(len(cuts[s]), np.int64))
        for name, s in shapes.items()
        for state in raw.STATES
    }
    infos = {name: ParameterInfo(name, s, dict.fromkeys(raw.STATES, "float32")) for name, s in shapes.items()}
    state = TrainingState((ParamGroup(tuple(shapes), {}),), global_steps=1)
    catalog = Catalog("deepspeed", "test", Layout(dp=ranks, zero=3), files, infos, tensors, state)
    return Checkpoint(Path("/run/step1"), catalog, Files())


def test_a_page_of_many_parameters_and_ranks_stays_small() -> None:
    """150 ranks × 800 parameters are 360,000 fragments; 1,000 × 10,000 make a page of 1.3 MB."""
    opened = many(800, 150)
    planned = plan(opened, Layout(dp=100, zero=3))
    verdict = Verdict("/run/step1", "deepspeed", "dp=150,zero=3", {}, ())
    data = report_data(verdict, summarise(opened), opened.catalog, planned, [])
    assert len(render(data)) < 400_000
    assert len(data["parameters"]["name"]) == 800
    assert len(data["parameters"]["maps"]) == 4  # equal ones are kept once
    assert len(data["plan"]["matrix"]) == 64
    assert sum(map(sum, data["plan"]["matrix"])) == planned.stored


def test_boxes_of_any_dimension_lie_on_the_plane() -> None:
    for shape in ((), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 5)):
        drawn = rectangles(shape, whole(shape), np.zeros(1, np.int64))
        rows = int(np.prod(shape[:-1])) if shape else 1
        assert drawn["boxes"] == [0, rows, 0, shape[-1] if shape else 1, 0, 0, 1]


@pytest.mark.slow
def test_in_a_browser(browser: str, report: Path, virtual: Path) -> None:
    script = """
      const text = (q, root) => [...(root || document).querySelectorAll(q)].map((n) => n.textContent);
      const all = (q) => [...document.querySelectorAll(q)];
      // By keyboard: what Tab stops at in the treemap, and Enter on the first module of several.
      const stops = [all('#treemap button').filter((b) => b.tabIndex >= 0).length];
      all('#treemap button.frame')[0].click();
      stops.push(all("#treemap button").filter((b) => b.tabIndex >= 0).length);
      stops.push(document.activeElement.closest("#treemap") !== null);
      document.querySelector('#crumbs button').click();
      const shown = all('#params tr').map((r) => text('td', r));
      all('#params button').find((b) => b.textContent === 'layer.0.weight').click();
      const clicked = {
        title: text('#detail h3')[0],
        rows: all('#detail tbody tr').map((r) => text('td', r)),
        rectangles: all('#detail svg rect').length,
      };
      for (const frame of all('#treemap button.frame').slice(0, 1)) frame.click();
      const leaf = document.querySelector('#treemap button[data-index]');
      leaf.focus();
      const tip = document.getElementById('tip').textContent;
      leaf.click();
      const search = document.getElementById('search');
      search.value = 'EMB w'; search.dispatchEvent(new Event('input'));
      const found = text('#params button');
      document.querySelector('[data-sort=bytes]').click();
      document.getElementById('theme').click();
      return {
        shown, clicked, tip, found, leaf: text('#detail h3')[0], tiles: text('#tiles dd'), status: text('#status')[0],
        plan: text('#plan-tiles dd'), matrix: all('#matrix rect').length, title: document.title,
        theme: document.documentElement.dataset.theme, findings: text('#finding-list li'),
        timings: text('#timings svg text'), stops, fits: document.documentElement.scrollWidth <= innerWidth,
      };
    """
    found, told = rendered(browser, report, script)
    assert told == []
    with ucp.open(virtual) as checkpoint:
        summary = summarise(checkpoint)
    assert found["shown"] == [
        [
            p.name,
            display.shape_text(p.shape),
            bytes_text(p.bytes),
            str(sum(s.fragments for s in p.states.values())),
        ]
        for p in summary.parameters
    ]
    layer = next(p for p in summary.parameters if p.name == "layer.0.weight")
    clicked = found["clicked"]
    assert clicked["title"] == layer.name
    assert len(clicked["rows"]) == clicked["rectangles"] == layer.states["param"].fragments > 1
    assert sum(int(row[2].replace(",", "")) for row in clicked["rows"]) == layer.elements
    assert {row[0] for row in clicked["rows"]} <= {h.name for h in summary.holders}
    assert found["leaf"] in {p.name for p in summary.parameters}
    assert found["leaf"] in found["tip"]
    assert found["found"] == ["embed.weight"]
    assert found["status"] == "whole"
    tiles = " ".join(found["tiles"])
    assert bytes_text(summary.bytes) in tiles
    assert bytes_text(summary.file_bytes) in tiles
    assert "zero=1" in tiles
    assert found["plan"][0] == "2"
    assert found["matrix"] == 4 * 2
    assert "virtual" in found["title"]
    assert found["theme"] in ("light", "dark")
    assert len(found["findings"]) == 2
    assert [text for text in found["timings"] if text.endswith(" s")] == ["1.50 s", "9.25 s"]  # without waiting
    assert found["fits"]
    # embed, layer, scale, temperature, frozen, mask and steps ('nothing' has no area); in layer.0 weight and bias
    assert found["stops"] == [7, 2, True]


@pytest.mark.slow
def test_a_damaged_one_in_a_browser(browser: str, tmp_path: Path, consolidated: Path) -> None:
    (consolidated / "model-00001-of-00001.safetensors").unlink()
    write_report(consolidated, tmp_path / "r.html")
    script = """
      const one = (id) => document.getElementById(id);
      return [one('status').textContent, one('finding-list').textContent, one('sizes').hidden];
    """
    (status, findings, hidden), told = rendered(browser, tmp_path / "r.html", script)
    assert told == []
    assert status == "damaged: 1 fault"
    assert "model-00001-of-00001.safetensors" in findings
    assert hidden
