"""What the runs say about a grid: for each line the true size, ours over seeds, the gap to the paper, a verdict; comparisons."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from audit import Size, size_of
from grid import Grid, Line
from judgement import Interval, Methods, compare_methods, holm, mean_interval, noise_of_gap
from records import Run, Stamp, images_of

REPRODUCED_SEEDS = 3
REPRODUCED_NOISE = 0.5  # points: above, an agreement proves too little
V100_MACS = 800 * 4.089e9  # per second: 800 images/s of ResNet-50 with FP16 on a V100, for estimates only


@dataclass(frozen=True)
class Entry:
    """A line as it stands. runs: finished ones of the shown stamp, by seed. top1, top5: accuracy in percent over seeds."""

    line: Line
    size: Size
    runs: dict[int, Run]
    missing: tuple[int, ...]
    top1: Interval | None
    top5: Interval | None
    gap: float | None  # ours - the paper's, points of top-1 accuracy
    verdict: str
    unfinished: tuple[Run, ...] = ()
    elsewhere: int = 0  # finished runs under another stamp

    @property
    def images_per_second(self) -> float | None:
        return float(np.mean([run.images_per_second for run in self.runs.values()])) if self.runs else None

    @property
    def gpu_hours(self) -> float | None:
        return sum(run.device_hours for run in self.runs.values()) if self.runs and self.on_gpu else None

    @property
    def on_gpu(self) -> bool:
        return all(run.on_gpu for run in self.runs.values())


@dataclass(frozen=True)
class Comparison:
    """A line against its baseline. p: after Holm's correction over all comparisons of the table."""

    base: Entry
    entry: Entry
    found: Methods
    p: float | None


@dataclass(frozen=True)
class Tally:
    grid: Grid
    entries: tuple[Entry, ...]
    stamp: Stamp | None  # what all shown numbers were taken under
    stamps: dict[Stamp, int]  # every one, with the number of finished runs
    comparisons: tuple[Comparison, ...]
    faithful: str
    epoch: str
    seeds: int

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers must know."""
        said = [f"accuracy of the {self.epoch} epoch (--epoch)"]
        said += [f"protocol of ours: {self.stamp}"] if self.stamp else ["nothing has been run yet"]
        said += [f"not shown, another protocol: {n} run{'s' if n > 1 else ''} of {stamp} (--stamp)"
                 for stamp, n in self.stamps.items() if stamp != self.stamp]
        return said + list(self.grid.notes)


def tally(grid: Grid, runs: list[Run], seeds: int, faithful: str = "paper", epoch: str = "last", stamp: int | None = None) -> Tally:
    """Fill ``grid``. stamp: which protocol to show, counted from 1 in the order of ``Tally.stamps`` (most runs first).

    Raises ValueError for a number that no protocol has.
    """
    matching = {line: [run for run in runs if run.likeness == line.likeness] for line in grid.lines}
    finished = {line: [run for run in found if run.final] for line, found in matching.items()}
    distinct = {run.folder: run for found in finished.values() for run in found}
    stamps = dict(Counter(run.stamp(epoch) for run in distinct.values()).most_common())
    if stamp is not None and not 1 <= stamp <= len(stamps):
        raise ValueError(f"--stamp {stamp}: there are {len(stamps)} protocols")
    shown = list(stamps)[(stamp or 1) - 1] if stamps else None

    chosen = {line: {run.seed: run for run in found if run.stamp(epoch) == shown} for line, found in finished.items()}
    samples = [[run.result(epoch)["top1"] for run in found.values()] for found in chosen.values()]
    entries = []
    for line in grid.lines:
        found = dict(sorted(chosen[line].items()))
        values = [run.result(epoch) for run in found.values()]
        top1, top5 = (mean_interval([v[key] for v in values]) if values else None for key in ("top1", "top5"))
        gap = top1.mean - (100 - line.printed.top1) if top1 and line.printed and grid.comparable else None
        others = len(finished[line]) - len(found)
        entries.append(Entry(
            line, size_of(line.overrides), found, tuple(s for s in range(seeds) if s not in found), top1, top5, gap,
            verdict(top1, gap, samples, others), tuple(run for run in matching[line] if not run.final), others))
    return Tally(grid, tuple(entries), shown, stamps, _compared(entries, epoch), faithful, epoch, seeds)


def verdict(top1: Interval | None, gap: float | None, samples: list[list[float]], elsewhere: int = 0) -> str:
    """not run | other protocol | run (nothing printed to compare with) | off | within noise | reproduced.

    off: the gap is larger than the 95 % noise of a mean over our seeds against one printed number. within noise: it is
    not. reproduced: it is not, over at least 3 seeds, and the noise is below 0.5 points, so that it could have shown.
    """
    if top1 is None:
        return "other protocol" if elsewhere else "not run"
    if gap is None:
        return "run"
    noise = noise_of_gap(samples, top1.n)
    if abs(gap) > noise:
        return f"off ({'better' if gap > 0 else 'worse'})"
    return "reproduced" if top1.n >= REPRODUCED_SEEDS and noise <= REPRODUCED_NOISE else "within noise"


def _compared(entries: list[Entry], epoch: str) -> tuple[Comparison, ...]:
    found = []
    for entry in entries:
        base = next((e for e in entries if e.line.label == entry.line.versus and e.line.group == entry.line.group), None)
        if base is None or not base.runs or not entry.runs:
            continue
        same = sorted(set(base.runs) & set(entry.runs))
        paired = len(same) > 1
        a, b = ([e.runs[s] for s in (same if paired else e.runs)] for e in (base, entry))
        images = {}
        if epoch == "last" and all((run.folder / "predictions.npz").is_file() for run in (*a, *b)):
            images = {"images_a": images_of(a), "images_b": images_of(b)}
        values_a, values_b = ([run.result(epoch)["top1"] for run in runs] for runs in (a, b))
        found.append((base, entry, compare_methods(values_a, values_b, paired or (len(a) == len(b) == 1), **images)))
    tested = [i for i, (_, _, methods) in enumerate(found) if methods.difference.n > 1]
    corrected = dict(zip(tested, holm([found[i][2].p for i in tested]), strict=True))
    return tuple(Comparison(*parts, corrected.get(i)) for i, parts in enumerate(found))


def hours(entry: Entry, known: list[Entry]) -> tuple[float | None, str]:
    """(hours times devices of one run, where the number is from): own runs, another line's by multiply-adds, or a V100's."""
    if entry.runs:
        return float(np.mean([run.device_hours for run in entry.runs.values()])), "measured"
    config = entry.line.config
    pixels = (config["data"].get("image_size", 224) / 224) ** 2
    for other in known:
        theirs = other.line.config
        if other.runs and theirs["data"] == config["data"]:
            scale = entry.size.macs / other.size.macs * config["epochs"] / theirs["epochs"]
            return scale * float(np.mean([run.device_hours for run in other.runs.values()])), f"from {other.line.label}"
    if not config["data"]["name"].startswith("imagenet"):
        return None, "unknown"
    return 1_281_167 * config["epochs"] * entry.size.macs * pixels / V100_MACS / 3600, "rough, V100 with FP16"


def total_hours(tally: Tally) -> tuple[float, int, str]:
    """(hours times devices of all missing cells, cells without an estimate, where the numbers are from)."""
    total, unknown, origins = 0.0, 0, {}
    for entry in tally.entries:
        one, origin = hours(entry, list(tally.entries))
        if not entry.missing:
            continue
        if one is None:
            unknown += len(entry.missing)
        else:
            total += one * len(entry.missing)
            origins[origin] = None
    assert math.isfinite(total)
    return total, unknown, "; ".join(origins)
