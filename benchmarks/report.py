"""A benchmark's figures as Markdown: the machine, the goals with what was measured, the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

__all__ = ["Goal", "goals", "gpu_table", "markdown"]

UNIT = "BN + ReLU"
GPU_GOALS = (
    ("each pass, maps of 50 MB and more, share of a copy's bandwidth", ">= 0.85"),
    ("AN + ReLU / eager BN + ReLU, geometric mean", "<= 0.85"),
    ("naive AN / AN, geometric mean", ">= 5"),
    ("AN-ResNet-50, eager BN elsewhere / eager BN, images/s", ">= 1.00"),
    ("AN-ResNet-50, everything fused / eager BN, images/s", ">= 1.08"),
    ("AN-ResNet-50, everything fused / compiled BN, images/s", ">= 0.97"),
    ("inference of AN-ResNet-50 / folded BN at batch 256", "<= 1.05"),
    ("SE-ResNet-50 and GN-ResNet-50 / eager BN, images/s", ">= 0.95"),
)


class Goal(NamedTuple):
    """A goal and what was measured: ``value`` (None: was not), ``where``: the configuration that decides."""

    what: str
    relation: str
    limit: float
    value: float | None
    where: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit


def goals(report: dict[str, Any]) -> list[Goal]:
    """The project's goals for a CPU against a report of benchmark.py."""
    layers = report["layers"]

    def ratio(name: str, to: str | None = None) -> Callable[[str], float | None]:
        """A key's ratio of ``name`` to the unit, or of ``to`` to ``name`` (how many times faster it is)."""

        def of(key: str) -> float | None:
            row = layers[key]
            if name not in row or (to and to not in row):
                return None
            return row[to]["ratio"] / row[name]["ratio"] if to else row[name]["ratio"]

        return of

    def extreme(
        what: str, relation: str, limit: float, of: Callable, keep: Callable[[str], bool] = lambda key: True
    ) -> Goal:
        found = {key: of(key) for key in layers if keep(key)}
        if not found or None in found.values():
            return Goal(what, relation, limit, None)
        where = (max if relation == "<=" else min)(found, key=found.get)
        return Goal(what, relation, limit, found[where], where)

    def mean(what: str, relation: str, limit: float, of: Callable) -> Goal:
        found = [of(key) for key in layers]
        if not found or None in found:
            return Goal(what, relation, limit, None)
        return Goal(
            what,
            relation,
            limit,
            math.exp(sum(map(math.log, found)) / len(found)),
            f"{len(found)} configurations",
        )

    an, large = ratio("an cpu"), lambda key: side(key) >= 28
    is_fp32, is_bf16 = (lambda key: key.endswith("fp32")), (lambda key: key.endswith("bf16"))
    slow_gn = lambda key: large(key) and key.endswith("NHWC bf16")
    table = [
        extreme("AN + ReLU, cpu, maps of 14x14 and larger", "<=", 0.95, an, lambda key: side(key) >= 14),
        extreme("AN + ReLU, cpu, maps of 7x7", "<=", 1.25, an, lambda key: side(key) == 7),
        mean("AN + ReLU, cpu, geometric mean", "<=", 0.75, an),
        extreme("AN, cpu: times faster than naive AN", ">=", 6, ratio("an cpu", "naive AN")),
        mean("AN, cpu: times faster than naive AN, geometric mean", ">=", 10, ratio("an cpu", "naive AN")),
        extreme("AN + ReLU, reference, fp32", "<=", 3.1, ratio("an reference"), is_fp32),
        extreme("AN + ReLU, reference, bf16", "<=", 4.5, ratio("an reference"), is_bf16),
        extreme("SN, cpu: times faster than naive SN", ">=", 5, ratio("sn cpu", "naive SN")),
        extreme("GN, cpu: times faster than nn.GroupNorm, bf16 NHWC, 28x28 and larger", ">=", 8,
                ratio("gn cpu", "nn.GroupNorm"), slow_gn),
        extreme("GN, cpu: times faster than nn.GroupNorm, elsewhere", ">=", 1,
                ratio("gn cpu", "nn.GroupNorm"), lambda key: not slow_gn(key)),
        extreme("SE + ReLU, cpu, maps of 28x28 and larger", "<=", 1.3, ratio("se cpu"), large),
        extreme("SE + ReLU, cpu, maps of 14x14", "<=", 2.0, ratio("se cpu"), lambda key: side(key) == 14),
        extreme("SE + ReLU, cpu, maps of 7x7", "<=", 2.7, ratio("se cpu"), lambda key: side(key) == 7),
    ]  # fmt: skip
    return table + _network_goals(report)


def _network_goals(report: dict[str, Any]) -> list[Goal]:
    def worst(what: str, limit: float, found: Iterable[tuple[str, float]]) -> Goal:
        where, value = max(found, key=lambda pair: pair[1], default=("", None))
        return Goal(what, "<=", limit, value, where)

    training, exact, memory = report["training"], report.get("exactness", {}), report["memory"]
    step = lambda name: [(key, row[name]["ratio"]) for key, row in training.items()]
    kept = [
        (f"{name}, {key}", row[name] - row[UNIT])
        for key, row in memory.items()
        for name in row
        if name.endswith(" cpu")
    ]
    same = [(name, 0.0 if value else 1.0) for name, value in exact.items() if "bitwise" in name]
    onnx = [(key, row["an in onnxruntime"]["ratio"]) for key, row in report["onnx"].items()]
    return [
        worst("ResNet-50 step, AN at its 16 places, eager BN elsewhere", 1.03,
              step("AN, eager BN elsewhere")),
        worst("ResNet-50 step, AN, everything fused, bf16 or NCHW", 0.96,
              [(k, v) for k, v in step("AN, everything fused") if not k.startswith("NHWC fp32")]),
        worst("variance in fp32, relative error up to mean/std 1e4 and with an outlier first", 1e-6,
              [(name, value) for name, value in exact.items() if "variance" in name]),
        worst("results that differ from run to run", 0, same),
        worst("AN-ResNet-50 in onnxruntime, batch 1 / BN folded", 1.10, onnx),
        worst("maps kept for backward, more than BN + ReLU keeps (small tensors count)", 0.01, kept),
    ]  # fmt: skip


def side(key: str) -> int:
    """Of "64x56x56 NCHW fp32": 56."""
    return int(key.split()[0].split("x")[1])


# ---- Markdown ----------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    facts = report["machine"]
    allocator = ", ".join(f"{name}={value}" for name, value in facts["allocator"].items())
    quick = " --quick" if report["quick"] else ""
    parts = [
        f"# {facts['hardware']}, {facts['threads']} threads",
        (
            f"Written by `python -m benchmarks.layers{quick}` in {report['seconds']} s. Figures are medians of calls "
            f"that take turns (clock: {facts['clock']}), [quartiles] of their ratios; layers at batch 16."
        ),
        (
            f"torch {facts['torch']} ({facts['capability']}), onnxruntime {facts['onnxruntime']}, Python "
            f"{facts['python']}, {facts['libc']}; C++ backend: {facts['cpu_backend']}; {facts['cores']} cores, "
            f"load at the start {facts['load']:.1f}."
        ),
        (
            f"Allocator: {allocator}. Writing to memory just allocated: {facts['fresh_write_gb_s']} GB/s; "
            f"a copy between warm buffers: {facts['warm_copy_gb_s']} GB/s (read and written)."
        ),
    ]
    if report["wrong"]:
        parts.append("**Wrong results, for which no speed is reported:**")
        parts.append("\n".join(f"* {name}: {reason}" for name, reason in report["wrong"].items()))
    parts += [
        "## Goals",
        _goal_table(goals(report)),
        "On a GPU (`benchmarks/gpu.py`):",
        gpu_table(report.get("gpu")),
    ]
    for title, part in (
        ("Layers, forward and backward, ratio to BN + ReLU", "layers"),
        ("Layers, inference, ratio to BN + ReLU", "layers_inference"),
        ("Under torch.compile, ratio to eager BN + ReLU", "compiled_layers"),
        ("ResNet-50 training step, 4 images, ratio to eager BN", "training"),
        ("In onnxruntime", "onnx"),
    ):
        if report[part]:
            parts += [f"## {title}", _table(report[part])]
    if report["memory"]:
        parts += [
            "## Kept for backward, in maps, beside the input and the residual",
            _plain_table(report["memory"]),
        ]
    return "\n\n".join(parts) + "\n"


def _goal_table(table: list[Goal]) -> str:
    rows = ["| goal | limit | measured | met | decided by |", "| --- | ---: | ---: | --- | --- |"]
    for goal in table:
        value = "not measured" if goal.value is None else f"{goal.value:.3g}"
        met = {None: "", True: "yes", False: "**no**"}[goal.met]
        rows.append(f"| {goal.what} | {goal.relation} {goal.limit:g} | {value} | {met} | {goal.where} |")
    return "\n".join(rows)


def gpu_table(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        rows = ["| goal | limit | measured |", "| --- | ---: | --- |"]
        return (
            "\n".join(rows + [f"| {what} | {limit} |  |" for what, limit in GPU_GOALS])
            + "\n\nNo GPU was at hand."
        )
    rows = ["| figure | goal | measured | met |", "| --- | ---: | ---: | --- |"]
    for section, figures in gpu.items():
        for name, entry in figures.items() if isinstance(figures, dict) else ():
            if isinstance(entry, dict) and entry["goal"] is not None:
                met = "**no**" if entry["missed"] else "yes"
                rows.append(f"| {section}: {name} | {entry['goal']:g} | {entry['value']:.3f} | {met} |")
    return f"Measured on: {gpu['machine']}\n\n" + "\n".join(rows)


def _table(part: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in part.values() for name in row))
    rows = [f"|  | {names[0]}, ms | " + " | ".join(names[1:]) + " |", "| --- |" + " ---: |" * len(names)]
    for key, row in part.items():
        cells = [f"{row[names[0]]['ms']:.2f}" + _peak(row[names[0]])]
        for name in names[1:]:
            entry = row.get(name)
            cells.append("" if entry is None else f"{entry['ratio']:.2f} [{entry['ratio_quartiles'][0]:.2f}, "
                         f"{entry['ratio_quartiles'][1]:.2f}]" + _peak(entry))  # fmt: skip
        rows.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _peak(entry: dict[str, Any]) -> str:
    return f", {entry['peak_mb']} MB" if entry.get("peak_mb") is not None else ""


def _plain_table(part: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(part.values())))
    rows = ["|  | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    return "\n".join(
        rows
        + [f"| {key} | " + " | ".join(f"{row[n]:.2f}" for n in names) + " |" for key, row in part.items()]
    )
