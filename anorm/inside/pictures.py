"""Pictures of what ``probes``, ``mixtures`` and ``landscape`` measured, narrow enough to be read on a phone."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from anorm.inside.drawing import COLOURS, Picture, draw_picture, layers_on_x
from anorm.inside.landscape import Point
from anorm.inside.mixtures import by_class, mixture
from anorm.inside.probes import LayerProbe, Responses
from anorm.inside.surgery import SurgeryCost

__all__ = [
    "gammas",
    "gates",
    "landscape",
    "mixture_by_class",
    "mixture_weights",
    "mixtures_used",
    "ranks",
    "responses",
    "shares",
    "surgery",
]


def responses(found: list[Responses], classes: list[str], run: str) -> list[Picture]:
    """One picture a stage, one panel a unit: a thin line an image, a thick one the mean of its class."""
    pictures = []
    for stage in sorted({r.stage for r in found}):
        units = [r for r in found if r.stage == stage]

        def draw(axes: list[Axes], units: list[Responses] = units) -> None:
            for ax, unit in zip(axes, units, strict=True):
                middle = np.linspace(unit.low, unit.high, unit.density.shape[1])
                for i, number in enumerate(unit.labels.unique().tolist()):
                    rows = unit.density[unit.labels == number].numpy()
                    rows = np.where(rows > 0, rows, np.nan)
                    colour = COLOURS[i % len(COLOURS)]
                    ax.plot(middle, rows.T, color=colour, lw=0.4, alpha=0.35)
                    mean = np.nan_to_num(rows).mean(0)
                    ax.plot(
                        middle, np.where(mean > 0, mean, np.nan), color=colour, lw=1.6, label=classes[number]
                    )
                ax.set_yscale("log")
                within, between = unit.similarity()
                ax.set_title(
                    f"stage-{unit.stage}-unit-{unit.unit}: "
                    f"distance {within:.3f} within, {between:.3f} between"
                )
                ax.set_ylabel("part of responses")
            axes[0].legend(ncols=2)
            axes[-1].set_xlabel("response")

        caption = (
            f"{run}, stage {stage}: histograms of filter responses by class (thin: an image, thick: the mean "
            "of a class); in the titles the mean total variation distance of two images' histograms"
        )
        pictures.append(
            draw_picture(f"responses-stage{stage}", caption, 0.5 + 1.75 * len(units), len(units), draw)
        )
    return pictures


def mixture_weights(seen: dict[str, LayerProbe], key: str) -> Picture:
    """The distribution of the weights over instances and components, layer by layer."""
    shown = {name: one.choices[key] for name, one in seen.items() if key in one.choices}
    bounded = all(choice.limit == 1.0 for choice in shown.values())
    top = 1.0 if bounded else max(float(choice.values.max()) for choice in shown.values()) or 1.0

    def draw(axes: list[Axes]) -> None:
        counts = np.stack(
            [np.histogram(c.values.numpy(), 40, (0, top))[0] / c.values.numel() for c in shown.values()]
        )
        drawn = axes[0].imshow(
            counts.T, origin="lower", aspect="auto", cmap="Blues", norm=PowerNorm(0.5, 0, counts.max()),
            extent=(-0.5, len(shown) - 0.5, 0, top),
        )  # fmt: skip
        axes[0].set_ylabel("weight")
        layers_on_x(axes[0], list(shown))
        axes[0].figure.colorbar(drawn, ax=axes[0], label="part of all weights of the layer")

    return draw_picture(
        _file(key), f"{key}: their distribution over instances and components, by layer", 3.2, 1, draw
    )


def _file(key: str) -> str:
    return key.replace(" ", "-")


def mixtures_used(seen: dict[str, LayerProbe], key: str) -> Picture:
    """How many of a layer's components its mixtures use."""
    shown = {name: one.choices[key] for name, one in seen.items() if key in one.choices}
    found = [mixture(choice.values, choice.limit) for choice in shown.values()]
    at = range(len(found))

    def draw(axes: list[Axes]) -> None:
        above, below = axes
        above.plot(at, [m.k for m in found], color="#999999", ls="--", lw=1, label="K")
        above.plot(at, [m.effective for m in found], "o-", ms=3, color=COLOURS[0], label="an instance's")
        above.plot(at, [m.of_mean for m in found], "s:", ms=3, color=COLOURS[1], label="of the mean weights")
        above.set(ylim=(0, None), ylabel="effective K")
        above.legend(ncols=3, loc="lower left")
        below.bar(at, [len(m.dead) for m in found], color="#333333", label="dead")
        below.bar(
            at, [len(m.saturated) for m in found], bottom=[len(m.dead) for m in found], color=COLOURS[4],
            label="saturated",
        )  # fmt: skip
        below.set(ylim=(0, max(1, *(m.k for m in found))), ylabel="components")
        below.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        below.legend(ncols=2, loc="upper left")
        layers_on_x(below, list(shown))

    caption = (
        f"{key}: exp(entropy) of the normalized weights, and how many components are closed (dead) or fully "
        "open (saturated) for 99 % of the instances"
    )
    return draw_picture(f"{_file(key)}-used", caption, 3.9, 2, draw, sharex=True, height_ratios=(3, 2))


def mixture_by_class(seen: dict[str, LayerProbe], key: str, numbers: list[int], classes: list[str]) -> Picture:
    """Mean weights of each class at the last layer of every stage that has one."""
    last = {one.stage: one for one in seen.values() if key in one.choices}

    def draw(axes: list[Axes]) -> None:
        for ax, (stage, one) in zip(axes, sorted(last.items()), strict=True):
            choice = one.choices[key]
            means = by_class(choice.values, one.labels, numbers).numpy()
            drawn = ax.imshow(means, aspect="auto", cmap="viridis", vmin=0, vmax=choice.limit)
            ax.set_yticks(range(len(numbers)), [classes[n][:14] for n in numbers])
            ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
            ax.set_title(f"stage {stage}, {one.name}")
            ax.figure.colorbar(drawn, ax=ax)
        axes[-1].set_xlabel("component")

    height = 0.6 + len(last) * (0.7 + 0.16 * len(numbers))
    return draw_picture(
        f"{_file(key)}-by-class", f"{key}: mean over the images of each class", height, len(last), draw
    )


def shares(seen: dict[str, LayerProbe]) -> Picture:
    """Importance weights: stacked bars, a panel for each choice."""
    keys = list(
        dict.fromkeys(key for one in seen.values() for key, c in one.choices.items() if c.kind == "shares")
    )

    def draw(axes: list[Axes]) -> None:
        for ax, key in zip(axes, keys, strict=True):
            shown = {name: one.choices[key] for name, one in seen.items() if key in one.choices}
            bottom = np.zeros(len(shown))
            for i in range(max(len(c.values) for c in shown.values())):
                part = np.array([float(c.values[i]) if i < len(c.values) else 0.0 for c in shown.values()])
                name = next(c.names[i] for c in shown.values() if i < len(c.names))
                ax.bar(range(len(shown)), part, bottom=bottom, width=0.9, color=COLOURS[i], label=name)
                bottom += part
            ax.set(ylim=(0, 1), title=f"importance weights of {key}")
        axes[0].legend(ncols=4, loc="lower center", frameon=True)
        layers_on_x(axes[-1], list(shown))

    return draw_picture(
        "importance", "importance weights of the statistics, by layer", 4.2, len(keys), draw, sharex=True
    )


def gates(seen: dict[str, LayerProbe], key: str) -> Picture:
    """A gate's values over instances and channels, layer by layer."""
    shown = {name: one.choices[key] for name, one in seen.items() if key in one.choices}

    def draw(axes: list[Axes]) -> None:
        at = range(len(shown))
        quantiles = np.stack(
            [np.quantile(c.values.numpy(), (0.05, 0.25, 0.5, 0.75, 0.95)) for c in shown.values()]
        ).T
        axes[0].vlines(at, quantiles[0], quantiles[4], color=COLOURS[0], lw=1, label="5 to 95 %")
        axes[0].vlines(at, quantiles[1], quantiles[3], color=COLOURS[0], lw=4, alpha=0.5, label="25 to 75 %")
        axes[0].plot(at, quantiles[2], "o", ms=3.5, color=COLOURS[1], label="median")
        if all(choice.limit == 1.0 for choice in shown.values()):
            axes[0].set_ylim(-0.03, 1.03)
        axes[0].set_ylabel(key)
        axes[0].legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
        layers_on_x(axes[0], list(shown))

    return draw_picture(_file(key), f"{key}: values over instances and channels, by layer", 3.2, 1, draw)


def gammas(of_runs: dict[str, dict[str, LayerProbe]]) -> Picture:
    """How much gamma differs between instances and between channels; batch norm's does not between instances."""

    def draw(axes: list[Axes]) -> None:
        for i, (run, seen) in enumerate(of_runs.items()):
            known = [one for one in seen.values() if one.known]
            between = [one.gamma_between_channels for one in known]
            axes[0].plot(
                [o.gamma_spread for o in known], "o", ms=4, color=COLOURS[i], label=f"{run}: instances"
            )
            axes[0].plot(between, ":", lw=1.2, color=COLOURS[i], label=f"{run}: channels")
        axes[0].set(ylim=(0, None), ylabel="std of gamma / mean |gamma|")
        axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, 1.24), ncols=2)
        longest = max(of_runs.values(), key=len)
        layers_on_x(axes[0], [one.name for one in longest.values() if one.known])

    caption = (
        "spread of gamma: standard deviation over instances (mean over channels) and over channels (of the "
        "mean over instances), in units of gamma's mean size"
    )
    return draw_picture("gammas", caption, 3.4, 1, draw)


def ranks(found: dict[str, dict[str, float]]) -> Picture:
    """Distance of the ranks' running statistics, layer by layer."""

    def draw(axes: list[Axes]) -> None:
        for i, key in enumerate(dict.fromkeys(key for one in found.values() for key in one)):
            values = [one.get(key, np.nan) for one in found.values()]
            axes[0].plot(values, "o", ms=4, color=COLOURS[i % len(COLOURS)], label=key)
        axes[0].set(ylim=(0, None), ylabel="distance / size")
        axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        layers_on_x(axes[0], list(found))

    return draw_picture(
        "ranks", "running statistics: root mean square distance of the ranks from their mean", 3.2, 1, draw
    )


def landscape(name: str, of_runs: dict[str, list[Point]], where: str) -> Picture:
    """Figure 4 of Santurkar et al.: range of the loss and of the gradient's change along the step, effective beta."""

    def draw(axes: list[Axes]) -> None:
        for i, (run, points) in enumerate(of_runs.items()):
            steps, colour = [p.step for p in points], COLOURS[i]
            few = "o" if len(points) < 4 else None
            for ax, values in ((axes[0], [p.losses for p in points]), (axes[1], [p.changes for p in points])):
                low, high = [min(v) for v in values], [max(v) for v in values]
                ax.fill_between(steps, low, high, color=colour, alpha=0.25, lw=1)
                ax.vlines(steps, low, high, color=colour, lw=1) if few else None
            axes[0].plot(steps, [p.loss for p in points], color=colour, marker=few, ms=4, lw=1.2, label=run)
            axes[2].plot(
                steps, [p.smoothness for p in points], color=colour, marker=few, ms=4, lw=1.2, label=run
            )
        axes[0].set_ylabel("loss")
        axes[1].set_ylabel("change of gradient")
        axes[2].set(ylabel="effective beta", xlabel="step")
        for ax in axes:
            values = [v for line in ax.lines for v in line.get_ydata()] + [
                v for band in ax.collections for path in band.get_paths() for v in path.vertices[:, 1]
            ]
            if values and min(values) > 0:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(NullFormatter())
        axes[2].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[0].legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    lengths = ", ".join(f"{t:g}" for t in next(iter(of_runs.values()))[0].lengths)
    caption = (
        f"along the gradient (steps of {lengths} times it), {where}: range of the loss, of the gradient's "
        "change, beta"
    )
    return draw_picture(name, caption, 5.4, 3, draw, sharex=True)


def surgery(found: list[SurgeryCost], whole: SurgeryCost) -> Picture:
    """Accuracy and loss that the averaging of each layer costs."""
    every = [*found, whole]

    def draw(axes: list[Axes]) -> None:
        at = range(len(every))
        for ax, values, label in (
            (axes[0], [one.top1 for one in every], "points of top-1 lost"),
            (axes[1], [one.loss for one in every], "loss added"),
        ):
            ax.bar(at, values, color=[COLOURS[0]] * len(found) + [COLOURS[1]])
            ax.axhline(0, color="#333333", lw=0.8)
            ax.set_ylabel(label)
        layers_on_x(axes[1], [one.name for one in every])

    return draw_picture(
        "surgery",
        "each layer with its mean gamma and beta for all images: what it costs",
        4.4,
        2,
        draw,
        sharex=True,
    )
