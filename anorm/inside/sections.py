"""What ``look_inside`` looks at, one function a section: words, numbers and pictures of what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from anorm.engine import checkpoint
from anorm.inside import pictures
from anorm.inside.drawing import Picture
from anorm.inside.landscape import Point, afresh, at_checkpoints
from anorm.inside.mixtures import explained_by_class, mixture
from anorm.inside.probes import LayerProbe, rank_divergence
from anorm.inside.probes import responses as measure_responses
from anorm.inside.subject import spread_out
from anorm.inside.surgery import operate
from anorm.inside.view import Inspection

__all__ = ["SECTIONS", "Section"]


@dataclass
class Section:
    """title; said: lines of words; numbers: for inside.json; columns: for the table of layers, layer -> text."""

    title: str
    said: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)


def responses(view: Inspection) -> Section:
    """The histograms of v1's Figure 2."""
    found = Section("Filter responses by class")
    for i, (run, subject) in enumerate(view.named(view.subjects).items()):
        with subject.as_evaluated():
            units = measure_responses(subject.model, view.of_chosen(subject), subject.evaluator.autocast)
        drawn = pictures.responses(units, [str(name) for name in subject.source.classes], run)
        prefix = f"run{i + 1}-" if view.other else ""
        found.pictures += [dataclasses.replace(p, name=prefix + p.name) for p in drawn]
        for unit in units:
            within, between = unit.similarity()
            found.numbers.setdefault(run, {})[unit.name] = {"within": within, "between": between}
        last = units[-1].similarity()
        found.said.append(
            f"{run}: {len(units)} units; at the last, stage-{units[-1].stage}-unit-{units[-1].unit}, two "
            f"images' histograms differ by {last[0]:.3f} within a class and {last[1]:.3f} between (total "
            "variation)"
        )
    return found


def mixtures(view: Inspection) -> Section:
    """AN's weights: distribution, entropy, effective K, dead and saturated components, by class."""
    found, seen = Section("Mixture weights"), view.seen[0]
    keys = _keys(seen, "mixture")
    if not keys:
        found.said.append("no layer of this run mixes affine maps")
    for key in keys:
        stats = {name: mixture(*_of(one, key)) for name, one in seen.items() if key in one.choices}
        apart = {
            n: explained_by_class(*_of(view.seen_by_class[n], key)[:1], view.seen_by_class[n].labels)
            for n in stats
        }
        found.numbers[key] = {n: dataclasses.asdict(s) | {"by_class": apart[n]} for n, s in stats.items()}
        found.columns |= {
            "K": {n: str(s.k) for n, s in stats.items()},
            "effective K": {n: f"{s.effective:.2f}" for n, s in stats.items()},
            "dead": {n: str(len(s.dead)) for n, s in stats.items()},
            "saturated": {n: str(len(s.saturated)) for n, s in stats.items()},
            "by class": {n: f"{value:.2f}" for n, value in apart.items()},
        }
        low, high = (pick(stats, key=lambda n: stats[n].effective / stats[n].k) for pick in (min, max))
        found.said.append(
            f"{key}: {len(stats)} layers; effective K from {stats[low].effective:.1f} of {stats[low].k} "
            f"({low}) to {stats[high].effective:.1f} of {stats[high].k} ({high}); dead components "
            f"{sum(len(s.dead) for s in stats.values())}, saturated "
            f"{sum(len(s.saturated) for s in stats.values())} of {sum(s.k for s in stats.values())}; "
            f"classes explain {min(apart.values()):.0%} to {max(apart.values()):.0%} of the weights' variance"
        )
        classes = [str(name) for name in view.run.source.classes]
        found.pictures += [
            pictures.mixture_weights(seen, key), pictures.mixtures_used(seen, key),
            pictures.mixture_by_class(view.seen_by_class, key, view.chosen(view.run), classes),
        ]  # fmt: skip
    return found


def _keys(seen: dict[str, LayerProbe], kind: str) -> list[str]:
    return list(
        dict.fromkeys(key for one in seen.values() for key, c in one.choices.items() if c.kind == kind)
    )


def _of(one: LayerProbe, key: str) -> tuple:
    """(values, limit) of a choice."""
    return one.choices[key].values, one.choices[key].limit


def gammas(view: Inspection) -> Section:
    """Spread of gamma over instances, against another run's (batch norm's is 0)."""
    found = Section("Gammas")
    of_runs = view.named(view.seen)
    for run, seen in of_runs.items():
        known = {name: one for name, one in seen.items() if one.known}
        found.numbers[run] = {
            name: {"instances": one.gamma_spread, "channels": one.gamma_between_channels}
            for name, one in known.items()
        }
        if not known:
            found.said.append(f"{run}: the layers do not tell their parts")
            continue
        varying = [name for name, one in known.items() if one.by_instance]
        top = max(known, key=lambda name: known[name].gamma_spread)
        found.said.append(
            f"{run}: gamma is a function of the instance in {len(varying)} of {len(seen)} layers; its "
            f"spread over instances is at most {known[top].gamma_spread:.3f} of its size"
            + (f" ({top})" if varying else "")
        )
    first = next(iter(found.numbers.values()))
    found.columns = {
        "gamma, instances": {name: f"{value['instances']:.4f}" for name, value in first.items()},
        "gamma, channels": {name: f"{value['channels']:.4f}" for name, value in first.items()},
    }
    shown = {run: seen for run, seen in of_runs.items() if found.numbers[run]}
    found.pictures = [pictures.gammas(shown)] if shown else []
    return found


def shares(view: Inspection) -> Section:
    """SN's importance weights."""
    found, seen = Section("Importance weights"), view.seen[0]
    keys = _keys(seen, "shares")
    if not keys:
        found.said.append("no layer of this run weighs statistics")
        return found
    for key in keys:
        values = {
            name: dict(zip(one.choices[key].names, _of(one, key)[0].tolist(), strict=True))
            for name, one in seen.items()
            if key in one.choices
        }
        found.numbers[key] = values
        mean = {
            name: sum(v[name] for v in values.values()) / len(values) for name in next(iter(values.values()))
        }
        found.said.append(
            f"{key}: on average {', '.join(f'{name} {part:.2f}' for name, part in mean.items())}"
        )
    found.pictures = [pictures.shares(seen)]
    return found


def gates(view: Inspection) -> Section:
    """SE's and BIN's gates, the lambdas of ASR-Norm and AFN."""
    found, seen = Section("Gates"), view.seen[0]
    keys = _keys(seen, "gates")
    if not keys:
        found.said.append("no layer of this run has gates")
    for key in keys:
        values = {name: _of(one, key)[0] for name, one in seen.items() if key in one.choices}
        found.numbers[key] = {
            name: {"mean": float(v.mean()), "least": float(v.min()), "most": float(v.max())}
            for name, v in values.items()
        }
        means = [one["mean"] for one in found.numbers[key].values()]
        found.said.append(f"{key}: {len(values)} layers, means from {min(means):.3f} to {max(means):.3f}")
        found.pictures.append(pictures.gates(seen, key))
    return found


def ranks(view: Inspection) -> Section:
    """How far the processes' running statistics lie apart, in the newest checkpoint that holds them apart."""
    found = Section("Running statistics of the ranks")
    files = sorted(view.run.folder.glob("last*.ckpt"), key=lambda path: (path.name != "last.ckpt", path.name))
    several = False
    for path in files:
        state = checkpoint.load(path)
        several |= state["processes"]["size"] > 1
        distances = rank_divergence(state, view.run.model)
        if any(value for one in distances.values() for value in one.values()):
            worst = max((value, name, key) for name, one in distances.items() for key, value in one.items())
            found.said.append(
                f"{path.name}, step {state['step']}, {state['processes']['size']} ranks: at most "
                f"{worst[0]:.4f} of the statistic's size ({worst[1]}, {worst[2]})"
            )
            found.numbers, found.pictures = distances, [pictures.ranks(distances)]
            found.columns = {"ranks": {name: f"{max(one.values()):.4f}" for name, one in distances.items()}}
            return found
    if not files:
        found.said.append("this run has kept no checkpoint")
    elif several:
        found.said.append("equal on all ranks in every checkpoint kept: they are joined at each evaluation")
    else:
        found.said.append("this run's checkpoints hold those of one process")
    return found


def landscape(view: Inspection) -> Section:
    """Loss and gradient along the step."""
    found = Section("Loss and gradient along the step")
    kept = view.named(at_checkpoints(subject, view.lengths) for subject in view.subjects)
    for run, points in kept.items():
        steps = ", ".join(str(p.step) for p in points)
        found.said.append(
            f"{run}: {len(points)} checkpoint{'s' if len(points) != 1 else ''}"
            + (f", step {steps}: a run keeps no earlier ones" if points else " kept")
            + ("" if view.steps else " (--steps N trains its first N steps again and measures on the way)")
        )
    parts = [("landscape-checkpoints", kept, "at the checkpoints kept")]
    if view.steps:
        fresh = view.named(list(afresh(s, view.steps, lengths=view.lengths)) for s in view.subjects)
        parts.append(("landscape-start", fresh, f"in the first {view.steps} steps, trained again"))
    for name, measured, where in parts:
        runs = {run: points for run, points in measured.items() if points}
        if not runs:
            continue
        found.numbers[name] = {run: [_point(p) for p in points] for run, points in runs.items()}
        found.said += [
            f"{run}, {where}: effective beta {min(p.smoothness for p in points):.3g} to "
            f"{max(p.smoothness for p in points):.3g}"
            for run, points in runs.items()
        ]
        found.pictures.append(pictures.landscape(name, runs, where))
    return found


def _point(point: Point) -> dict[str, Any]:
    return dataclasses.asdict(point) | {"smoothness": point.smoothness}


def surgery(view: Inspection) -> Section:
    """Each layer whose affine depends on the instance, with its mean over training images instead."""
    found, run = Section("Norm surgery"), view.run
    train = run.source.train
    calibration = run.batches(train, spread_out(len(train), view.images))
    seen = view.seen_in(run, calibration)
    evaluation = view.evaluation(run)
    if not any(one.by_instance for one in seen.values()):
        found.said.append("no layer's gamma or beta depends on the instance: there is nothing to average")
        return found
    with run.as_evaluated():
        whole, each, together = operate(run.model, seen, lambda: run.evaluate(evaluation))
    worst = max(each, key=lambda one: (one.top1, one.loss))
    found.said.append(
        f"top-1 {whole['top1']:.2f} % of {whole.images} evaluation images; gamma and beta averaged over "
        f"{min(view.images or len(train), len(train))} training images, one layer at a time: at most "
        f"{worst.top1:+.2f} points lost ({worst.name}); all {len(each)} at once: {together.top1:+.2f} points"
    )
    found.numbers = {
        "top1": whole["top1"], "loss": whole["loss"], "images": whole.images,
        "layers": {one.name: dataclasses.asdict(one) for one in each}, "all": dataclasses.asdict(together),
    }  # fmt: skip
    found.columns = {
        "surgery, top-1 lost": {one.name: f"{one.top1:.2f}" for one in each},
        "surgery, loss added": {one.name: f"{one.loss:.4f}" for one in each},
    }
    found.pictures = [pictures.surgery(each, together)]
    return found


SECTIONS: dict[str, Callable[[Inspection], Section]] = {
    "responses": responses, "mixtures": mixtures, "gammas": gammas, "shares": shares, "gates": gates,
    "ranks": ranks, "landscape": landscape, "surgery": surgery,
}  # fmt: skip
