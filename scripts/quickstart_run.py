"""The quickstart: a DeepSpeed run that changes its layout twice, beside the same run uninterrupted.

Every training below is a launch of quickstart_rank.py with torch.distributed.run, as a user would start it. This file
launches them in order, then compares what they report. It exits with 0 only if everything that it checks holds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
MARKER = "made-by-the-quickstart"  # without it in a folder, that folder is not ours to delete
SAVE_AT, STEPS = 8, 16
TIME_LIMIT = 600  # seconds for one launch, far above what the slowest takes: a hang must not wait for ever

# How far a resumed run's loss may be from the uninterrupted run's. The first loss depends on the loaded weights alone.
# Later ones also on the order in which other numbers of ranks add up gradients, hence the wider bound.
FIRST_LOSS_BOUND = 1e-4
LATER_LOSS_BOUND = {"bf16": 4e-3, "fp32": 5e-5}


@dataclass(frozen=True)
class Layout:
    ranks: int
    zero: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, ZeRO-{self.zero}"


@dataclass(frozen=True)
class Column:
    """One resumed run in the table, with what is asked of it."""

    heading: tuple[str, str]
    losses: list[float]
    kind: str  # "equal", "close" or "control"

    def verdict(self, reference: list[float], bound: float) -> tuple[bool, str]:
        first, later = differences(self.losses, reference)
        if self.kind == "equal":
            return (True, "equal") if first == later == 0 else (False, "NOT EQUAL")
        if self.kind == "close":
            return (True, "agrees") if first <= FIRST_LOSS_BOUND and later <= bound else (False, "DISAGREES")
        return (True, "differs") if max(first, later) > bound else (False, "UNNOTICED")


class QuickstartError(Exception):
    """A step of the quickstart failed; the message is for the user."""


def main() -> int:
    args = parse_arguments()
    try:
        return 0 if quickstart(args) else 1
    except QuickstartError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="training precision (default: bf16)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: GPUs where there are any")
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=SCRIPTS.parent / "quickstart-run",
        help="where checkpoints and logs go; replaced by every run (default: quickstart-run)",
    )
    return parser.parse_args()


def quickstart(args: argparse.Namespace) -> bool:
    began = time.monotonic()
    device, layouts, place = choose_layouts(args.device)
    source, direct, universal = layouts
    folder = prepare_folder(args.run_dir)
    launcher = Launcher(folder, device, args.dtype)

    heading("universal-checkpoint quickstart")
    print(f"{place}. Precision {args.dtype}. Checkpoints and DeepSpeed's logs: {shown(folder)}/\n")

    with Step(f"Train a small Llama with plain DeepSpeed on {source}") as step:
        trained = launcher.run("train", source, "native")
        step.note(f"{trained['parameters']:,} parameters in {trained['tensors']} tensors, AdamW, two param groups")
        step.note(f"saved after step {SAVE_AT}, went on to step {STEPS}: the uninterrupted run")
    with Step(f"Resume on {direct}, straight from DeepSpeed's files") as step:
        resumed_direct = launcher.run("resume", direct, "native")
        note_load(step, resumed_direct)
    with Step("Convert: ucp-convert native universal") as step:
        launcher.convert("native", "universal")
        step.note(f"{megabytes(folder / 'native')} MB became {megabytes(folder / 'universal')} MB")
    with Step(f"Resume on {universal}, from the universal folder") as step:
        resumed_universal = launcher.run("resume", universal, "universal")
        note_load(step, resumed_universal)
    with Step(f"Resume on {source} again, then twice wrongly on purpose") as step:
        resumed_same = launcher.run("resume", source, "native", "--controls")
        note_load(step, resumed_same)

    reference = trained["losses"][SAVE_AT:]
    columns = [
        Column(column_heading(direct), resumed_direct["losses"], "close"),
        Column(column_heading(universal), resumed_universal["losses"], "close"),
        Column(column_heading(source), resumed_same["losses"], "equal"),
        Column(("optimizer", "zeroed"), resumed_same["losses with optimizer states zeroed"], "control"),
        Column(("q and k", "swapped"), resumed_same["losses with q and k swapped"], "control"),
    ]
    bound = LATER_LOSS_BOUND[args.dtype]
    print_table(reference, columns, bound)
    states_hold = print_state_verdicts([resumed_direct, resumed_universal, resumed_same])
    losses_hold = print_loss_verdicts(reference, columns, bound)
    holds = states_hold and losses_hold
    print(f"\n{mark(holds)} {'Everything agrees' if holds else 'NOT everything agrees'}", end="")
    print(f" ({time.monotonic() - began:.0f} s)")
    return holds


def choose_layouts(device: str | None) -> tuple[str, tuple[Layout, Layout, Layout], str]:
    """The device, the layouts of the training and of the two resumed runs, and a sentence about them."""
    gpus = 0
    if device != "cpu":
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise QuickstartError("--device cuda: this machine has no GPU that torch can use; leave the flag out")
    if not gpus:
        return "cpu", (Layout(4, 1), Layout(2, 3), Layout(3, 2)), f"On the CPU ({os.cpu_count()} cores), over gloo"
    ranks = {1: (1, 1, 1), 2: (2, 1, 2), 3: (3, 2, 3)}.get(gpus, (4, 2, 3))
    place = f"On {gpus} GPU{'s' if gpus > 1 else ''}, over nccl"
    if gpus == 1:
        place += " (one rank each, so that only the ZeRO stage changes; --device cpu changes the ranks as well)"
    elif gpus < 4:
        place += " (fewer than 4, so the layouts have fewer ranks)"
    return "cuda", (Layout(ranks[0], 1), Layout(ranks[1], 3), Layout(ranks[2], 2)), place


def prepare_folder(folder: Path) -> Path:
    folder = folder.absolute()
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise QuickstartError(f"{folder} exists and holds other files; name another folder with --run-dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


class Launcher:
    """Starts trainings and conversions in the run's folder, each with a log of its own."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.count = 0

    def run(self, role: str, layout: Layout, checkpoint: str, *more: str) -> dict[str, Any]:
        report = self.folder / f"{role}-{layout.ranks}-ranks-zero-{layout.zero}.json"
        self._call(
            report.stem,
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={layout.ranks}"),
                *(str(SCRIPTS / "quickstart_rank.py"), role, f"--zero={layout.zero}", f"--dtype={self.dtype}"),
                *(f"--device={self.device}", f"--save-at={SAVE_AT}", f"--steps={STEPS}", f"--report={report}"),
                *(f"--checkpoint={self.folder / checkpoint}", f"--truth={self.folder / 'truth.pt'}", *more),
            ],
        )
        return json.loads(report.read_text())

    def convert(self, source: str, target: str) -> None:
        command = Path(sys.executable).with_name("ucp-convert")
        self._call("convert", [str(command), str(self.folder / source), str(self.folder / target)])

    def _call(self, name: str, command: list[str]) -> None:
        self.count += 1
        log = self.folder / f"{self.count}-{name}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # there may be more ranks than cores
            "TORCHDYNAMO_DISABLE": "1",  # nothing here is compiled, and loading the compiler costs each rank seconds
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if self.device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        else:
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for to be deterministic
        with log.open("w") as output:
            print("$", *command, file=output, flush=True)
            # A session of its own, so that a failure or Ctrl-C takes all ranks with it.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                code = process.wait(timeout=TIME_LIMIT)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code != 0:
            what = f"took more than {TIME_LIMIT} s" if code is None else f"failed with exit code {code}"
            raise QuickstartError(f"{name} {what}; from {shown(log)}:\n{telling_lines(log)}")


class Step:
    """A numbered line that appears when the step begins and gets its time and notes when it ends."""

    count = 0

    def __init__(self, title: str) -> None:
        Step.count += 1
        self.title = f"{Step.count}  {title}"
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __enter__(self) -> Step:
        print(f"{self.title} ...", end="", flush=True)
        self.began = time.monotonic()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        print(f"  {time.monotonic() - self.began:.1f} s" if kind is None else "", flush=True)
        for note in self.notes:
            print(f"   {note}")


def print_table(reference: list[float], columns: list[Column], bound: float) -> None:
    width, first_width = 12, 16

    def row(label: str, cells: list[str]) -> None:
        print(f"{label:<{first_width}}" + "".join(f"{cell:>{width}}" for cell in cells))

    print()
    heading("Losses, step by step")
    resumed = " resumed on ".center(3 * width - 2, "─")
    wrong = " wrong on purpose ".center(2 * width - 2, "─")
    print(" " * (first_width + width + 2) + f"{resumed}  {wrong}")
    row("", ["uninter-"] + [column.heading[0] for column in columns])
    row("step", ["rupted"] + [column.heading[1] for column in columns])
    for index, loss in enumerate(reference):
        row(f"{SAVE_AT + 1 + index:>4}", [f"{loss:.6f}"] + [f"{column.losses[index]:.6f}" for column in columns])
    row("off by: first", [""] + [f"{short(differences(column.losses, reference)[0], 1)}" for column in columns])
    row("      largest", [""] + [f"{short(max(differences(column.losses, reference)), 1)}" for column in columns])
    allowed = {"close": f"≤ {short(bound)}", "equal": "0", "control": f"> {short(bound)}"}
    row("must be", [""] + [allowed[column.kind] for column in columns])
    row("", [""] + [column.verdict(reference, bound)[1] for column in columns])
    print()


def print_state_verdicts(reports: list[dict[str, Any]]) -> bool:
    differing = [line for report in reports for line in report["state"]["differing"]]
    holds = not differing and all(report["state"]["tensors"] for report in reports)
    print(
        f"{mark(holds)} Right after each of the {len(reports)} loads the state "
        + ("was bit-equal to the one saved" if holds else f"differed in {len(differing)} places")
    )
    print("  (fp32 masters, Adam's moments, step counts, learning rate, param groups; weights are the masters rounded)")
    for line in differing[:10]:
        print(f"    {line}")
    return holds


def print_loss_verdicts(reference: list[float], columns: list[Column], bound: float) -> bool:
    def all_hold(kind: str) -> bool:
        return all(column.verdict(reference, bound)[0] for column in columns if column.kind == kind)

    verdicts = [
        (
            all_hold("close"),
            f"On other layouts the losses agree with the uninterrupted run's (first to {short(FIRST_LOSS_BOUND)}, "
            f"then to {short(bound)})",
        ),
        (all_hold("equal"), "On the same layout they are exactly equal"),
        (all_hold("control"), "Both wrong resumes stand out, so these bounds would notice a mistake"),
    ]
    for holds, text in verdicts:
        print(f"{mark(holds)} {text if holds else 'NOT true: ' + text}")
    return all(holds for holds, _ in verdicts)


def differences(losses: list[float], reference: list[float]) -> tuple[float, float]:
    """How far the first loss is off, and the largest distance of the later ones."""
    first, *later = [abs(loss - other) for loss, other in zip(losses, reference, strict=True)]
    return first, max(later)


def note_load(step: Step, report: dict[str, Any]) -> None:
    state = report["state"]
    step.note(report["load"])
    if state["differing"]:
        step.note(f"{mark(False)} the state differs from the one saved in {len(state['differing'])} places")
    else:
        step.note(f"{mark(True)} all {state['tensors']} tensors are bit-equal to those saved")


def column_heading(layout: Layout) -> tuple[str, str]:
    return f"{layout.ranks} rank{'s' if layout.ranks > 1 else ''}", f"ZeRO-{layout.zero}"


def telling_lines(log: Path) -> str:
    """One rank's traceback where the log has one (the launcher's own, after it, says nothing), else the log's end."""
    lines = log.read_text(errors="replace").splitlines()
    ranks = [line for line in lines if line.startswith("[rank")]
    if ranks:
        lines = [line for line in ranks if line.split(":")[0] == ranks[0].split(":")[0]]
    return "\n".join(f"    {line}" for line in lines[-20:])


def megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f}"


def short(number: float, digits: int = 0) -> str:
    return f"{number:.{digits}e}".replace("e-0", "e-") if number else "0"


def shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def heading(text: str) -> None:
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text)


def mark(holds: bool) -> str:
    sign = "✓" if holds else "✗"
    return f"\033[{32 if holds else 31}m{sign}\033[0m" if sys.stdout.isatty() else sign


if __name__ == "__main__":
    sys.exit(main())
