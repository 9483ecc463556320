"""How fast the layers are on this CPU, beside torch's own and the naive forms. (On a GPU: gpu.py.)

    python -m benchmarks.layers                     everything, to benchmarks/HARDWARE.json and .md
    python -m benchmarks.layers --quick             fewer shapes and rounds, no torch.compile: a few minutes
    python -m benchmarks.layers --only layers networks
    python -m benchmarks.layers --gpu gpu.json    with a GPU's figures beside them in the table

The unit is nn.BatchNorm2d + in-place ReLU in the same run. Contenders take turns; a figure is a median, with
quartiles. A layer whose results are wrong gets no figure and the command fails. By default malloc is told to
keep large buffers (the command restarts itself with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised):
--malloc system leaves it alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
from anorm import create_model, create_norm, ops
from anorm.norms.base import Norm
from benchmarks.naive import naive, networks
from benchmarks.report import markdown
from benchmarks.timing import MALLOC, Contender, Timing, interleaved, kept_bytes, machine, peak_bytes

BATCH = 16
# channels, side and K of ResNet-50's AN layers
MAPS = [
    (64, 56, 10),
    (128, 28, 10),
    (256, 14, 20),
    (512, 7, 20),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAWS = ("bn", "an", "gn", "sn", "se")
UNIT = "BN + ReLU"
NETWORKS = (
    "eager BN", "AN, eager BN elsewhere", "naive AN, eager BN elsewhere", "AN, everything fused", "BN, everything fused",
)  # fmt: skip
NAIVE = {"bn": UNIT, "an": "naive AN", "gn": "nn.GroupNorm", "sn": "naive SN", "se": "naive SE"}
BUFFER = str(2**30)  # malloc: map nothing below this anew, keep that much at the top


def layer(law: str, channels: int, k: int = 10) -> Norm:
    torch.manual_seed(0)
    return create_norm(law, channels, act="relu", **({"k": k} if law == "an" else {}))


def feature_maps(count: int, channels: int, side: int, layout: str, dtype: torch.dtype) -> list[Tensor]:
    shape = (BATCH, channels, side, side)
    return [torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout]) for _ in range(count)]


def backends() -> list[str]:
    return ["reference"] + (["cpu"] if ops.why_not("cpu") is None else [])


# ---- correctness -------------------------------------------------------------------------------------------


def results(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients, the parameters' in order and flat."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    parameters = list(module.parameters())
    return [
        y.detach(),
        *(g.flatten() if i else g for i, g in enumerate(torch.autograd.grad(y, [leaf, *parameters], dy))),
    ]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


def wrong(law: str, backend: str, layout: str, dtype: torch.dtype) -> str | None:
    """None where output and gradients are right, else what is not.

    Right is an error, against the naive form in float64, of at most twice the naive form's own at this
    precision, plus 1e-5 (the naive sums' luck in float32).
    """
    ours = layer(law, 64)
    twin = naive(ours)
    x, dy = feature_maps(2, 64, 14, layout, dtype)
    x = x + 0.5
    exact = results(copy.deepcopy(twin).double(), x.double(), dy.double())
    own = results(twin, x, dy)
    with ops.use_backend(backend):
        found = results(ours, x, dy)
    names = ["y", "dx", *(name for name, _ in ours.named_parameters())]
    for name, a, b, c in zip(names, found, own, exact, strict=True):
        allowed = 2 * error(b, c) + 1e-5
        if not error(a, c) <= allowed:
            return f"{name} has a relative error of {error(a, c):.1e}, above {allowed:.1e}"
    return None


def correctness(report: dict, quick: bool) -> None:
    """Every law on every backend against its naive form in float64, output and gradients."""
    for law in LAWS:
        for backend in backends():
            for layout in LAYOUTS:
                for name, dtype in DTYPES.items():
                    if (reason := wrong(law, backend, layout, dtype)) is not None:
                        report["wrong"][f"{law} {backend} {layout} {name}"] = reason
    say(f"  {len(report['wrong'])} of {len(LAWS) * len(backends()) * 4} combinations are wrong")
    for name, reason in report["wrong"].items():
        say(f"  WRONG {name}: {reason}")


def exactness(report: dict, quick: bool) -> None:
    """Error of the variance in float32 at mean/std up to 1e4, and behind an outlier; bits from run to run."""
    found = report["exactness"] = {}
    for backend in backends():
        ops.set_backend(backend)
        module = ops.resolve("cpu")
        worst = 0.0
        for ratio in (0.0, 1.0, 1e2, 1e3, 1e4):
            for outlier in (False, True):
                for layout in LAYOUTS:
                    x, _ = feature_maps(2, 32, 56, layout, torch.float32)
                    x = x + ratio
                    if outlier:
                        x[:, :, 0, 0] = ratio + 1000.0
                    exact = x.double().var((2, 3), correction=0)
                    worst = max(worst, ((module.moments(x)[1] - exact).abs() / exact).max().item())
        found[f"{backend}: worst relative error of the variance"] = worst
        same = True
        for law in LAWS:
            x, dy = feature_maps(2, 64, 28, "NHWC", torch.float32)
            first, second = (results(copy.deepcopy(layer(law, 64)), x, dy) for _ in range(2))
            same &= all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        found[f"{backend}: bitwise equal from run to run"] = same
    ops.set_backend("auto")
    for name, value in found.items():
        say(f"  {name}: {value}")


# ---- layers ------------------------------------------------------------------------------------------------


def training_call(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    wanted = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), wanted, dy)


def inference_call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    module.eval()

    @torch.inference_mode()
    def run() -> Tensor:
        return module(x)

    return run


def competitors(channels: int, k: int) -> dict[str, tuple[nn.Module, str, str | None]]:
    """Label -> (module, backend, law): the unit first, then every law in each form."""
    found: dict[str, tuple[nn.Module, str, str | None]] = {}
    for law in LAWS:
        ours = layer(law, channels, k)
        found[NAIVE[law]] = (naive(ours), "auto", None)
        for backend in reversed(backends()):
            if backend == "cpu" or law in ("an", "bn"):
                found[f"{law} {backend}"] = (copy.deepcopy(ours), backend, law)
    return found


def configurations(quick: bool):
    for channels, side, k in MAPS:
        for layout in LAYOUTS:
            for name, dtype in DTYPES.items():
                if not (quick and side == 28 and layout == "NCHW"):
                    yield channels, side, k, layout, name, dtype


def layers(report: dict, quick: bool) -> None:
    """Forward and backward of one layer + ReLU, and its inference, as ratios to BN + ReLU."""
    rounds = 9 if quick else 21
    for channels, side, k, layout, kind, dtype in configurations(quick):
        key = f"{channels}x{side}x{side} {layout} {kind}"
        x, dy = feature_maps(2, channels, side, layout, dtype)
        found = {
            n: c for n, c in competitors(channels, k).items() if f"{n} {layout} {kind}" not in report["wrong"]
        }
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        train = {n: Contender(training_call(m, leaf, dy), b) for n, (m, b, _) in found.items()}
        report["layers"][key] = record(interleaved(train, rounds))
        infer = {
            n: Contender(inference_call(m, x), b) for n, (m, b, _) in found.items() if "reference" not in n
        }
        report["layers_inference"][key] = record(interleaved(infer, rounds // 2))
        line(
            key,
            report["layers"][key],
            ("bn cpu", "an cpu", "an reference", "naive AN", "gn cpu", "sn cpu", "se cpu"),
        )


def compiled_layers(report: dict, quick: bool) -> None:
    """The same under torch.compile (inductor), eager BN + ReLU as the unit."""
    for channels, side, k, layout, kind, dtype in configurations(False):
        if side not in (56, 14) or (side == 14 and kind == "bf16"):
            continue
        torch._dynamo.reset()
        key = f"{channels}x{side}x{side} {layout} {kind}"
        x, dy = feature_maps(2, channels, side, layout, dtype)
        x.requires_grad_()
        an = layer("an", channels, k)
        modules = {UNIT: (naive(layer("bn", channels)), "auto")}
        modules["compiled BN + ReLU"] = (torch.compile(naive(layer("bn", channels))), "auto")
        modules["compiled naive AN"] = (torch.compile(naive(an)), "auto")
        if "cpu" in backends() and f"an cpu {layout} {kind}" not in report["wrong"]:
            modules["an cpu"] = (copy.deepcopy(an), "cpu")
            modules["compiled an cpu"] = (torch.compile(copy.deepcopy(an), fullgraph=True), "cpu")
        timed = {n: Contender(training_call(m, x, dy), b) for n, (m, b) in modules.items()}
        report["compiled_layers"][key] = record(interleaved(timed, 7))
        line(key, report["compiled_layers"][key], tuple(modules)[1:])


def memory(report: dict, quick: bool) -> None:
    """Bytes that a layer keeps for backward beside its input, in units of one map."""
    for layout in LAYOUTS:
        for kind, dtype in DTYPES.items():
            x, r = feature_maps(2, 64, 56, layout, dtype)
            x.requires_grad_()
            unit = x.numel() * x.element_size()
            for with_residual in (False, True):
                key = f"64x56x56 {layout} {kind}{', residual' if with_residual else ''}"
                found = {}
                for name, (module, backend, _) in competitors(64, 10).items():
                    ops.set_backend(backend)
                    given = (x, r, *module.parameters(), *module.buffers())
                    call = partial(module, x, r) if with_residual else partial(module, x)
                    found[name] = round(kept_bytes(call, given) / unit, 3)
                report["memory"][key] = found
                say(f"  {key}: " + ", ".join(f"{n} {v}" for n, v in found.items()))
    ops.set_backend("auto")


# ---- networks ----------------------------------------------------------------------------------------------


def training_steps(report: dict, quick: bool) -> None:
    """A step of ResNet-50 (4 images of 224 x 224) as ratios to eager BN, and its peak of memory."""
    for layout in LAYOUTS:
        for kind in DTYPES:
            key = f"{layout} {kind}{' autocast' if kind == 'bf16' else ''}"
            if any(f"{law} cpu {layout} {kind}" in report["wrong"] for law in ("an", "bn")):
                continue
            steps = {name: step(make, layout, kind) for name, make in networks().items() if name in NETWORKS}
            report["training"][key] = record(
                interleaved({n: Contender(s) for n, s in steps.items()}, 5 if quick else 11)
            )
            for name, run in steps.items():
                rise = peak_bytes(run)
                report["training"][key][name]["peak_mb"] = None if rise is None else round(rise / 1e6)
            line(key, report["training"][key], tuple(steps)[1:])


def step(make, layout: str, kind: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = create_model("resnet50", norm=make).to(memory_format=LAYOUTS[layout])
    images, labels = torch.randn(4, 3, 224, 224).to(memory_format=LAYOUTS[layout]), torch.randint(1000, (4,))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    return run


def onnx_inference(report: dict, quick: bool) -> None:
    """ResNet-50 in onnxruntime, one image of 224 x 224: AN as export.py writes it, against BN folded."""
    from anorm.deploy.export import check, open_session, program, settle, to_onnx
    from anorm.deploy.folding import fold

    images, threads = torch.randn(1, 3, 224, 224), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable] = {}
        for norm in ("bn", "an"):
            torch.manual_seed(0)
            model = create_model("resnet50", norm)
            settle(model)
            path = Path(folder) / f"{norm}.onnx"
            to_onnx(program(fold(model)[0], 224)[0], path)
            runs[norm] = open_session(path, threads)
            try:
                check(runs[norm], model, [(1, 3, 224, 224), (2, 3, 160, 192)])
            except ValueError as reason:
                report["wrong"][f"{norm} onnxruntime"] = str(reason)
                return
        timed = {
            f"{norm} in onnxruntime": Contender(lambda run=run: run(images)) for norm, run in runs.items()
        }
        found = record(interleaved(timed, 31 if quick else 101, least_ms=0))
    report["onnx"]["resnet50, batch 1"] = found
    line("resnet50, batch 1", found, tuple(timed)[1:])


# ---- the run -----------------------------------------------------------------------------------------------


def record(timings: dict[str, Timing]) -> dict[str, dict]:
    rounded = lambda v: [round(i, 4) for i in v] if isinstance(v, tuple) else round(v, 4)
    return {
        name: {field: rounded(value) for field, value in t._asdict().items()} for name, t in timings.items()
    }


def line(key: str, found: dict[str, dict], shown: tuple[str, ...]) -> None:
    unit = next(iter(found.values()))["ms"]
    say(
        f"  {key:24s} {unit:8.2f} ms | "
        + " | ".join(f"{n} {found[n]['ratio']:.2f}" for n in shown if n in found)
    )


def say(text: str) -> None:
    print(text, flush=True)


SECTIONS = {
    f.__name__: f for f in (exactness, memory, layers, training_steps, onnx_inference, compiled_layers)
}
PARTS = ("layers", "layers_inference", "compiled_layers", "memory", "training", "onnx", "wrong")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--malloc", choices=("keep", "system"), default="keep")
    parser.add_argument("--gpu", type=Path, help="the JSON of benchmarks/gpu.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    asked = parser.parse_args(argv)
    if asked.malloc == "keep" and any(os.environ.get(name) != BUFFER for name in MALLOC):
        os.environ.update(dict.fromkeys(MALLOC, BUFFER))
        # malloc reads them when a process starts
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.layers", *argv])
    if asked.threads:
        torch.set_num_threads(asked.threads)
    report: dict = {"machine": machine(), "quick": asked.quick, **{name: {} for name in PARTS}}
    say(json.dumps(report["machine"]))
    wanted = asked.only or [name for name in SECTIONS if not (asked.quick and name == "compiled_layers")]
    begin = time.monotonic()
    for run in (correctness, *(SECTIONS[name] for name in wanted)):
        say(f"{run.__name__} ({time.monotonic() - begin:.0f} s): {(run.__doc__ or '').partition(chr(10))[0]}")
        run(report, asked.quick)
    report["seconds"] = round(time.monotonic() - begin)
    if asked.gpu:
        report["gpu"] = json.loads(asked.gpu.read_text())
    asked.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(
        r"[^a-z0-9]+", "-", f"{report['machine']['hardware']} {report['machine']['threads']} threads".lower()
    ).strip("-")
    (asked.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (asked.out / f"{name}.md").write_text(markdown(report))
    say(f"{asked.out / name}.json and .md, {report['seconds']} s")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
