"""The Triton backend on a GPU: correct, and how fast. One command, under ten minutes; needs torch and Triton only.

    python -m benchmarks.gpu                                  everything, to gpu.json and a table on the terminal
    python -m benchmarks.gpu --only correctness passes        some sections
    python -m benchmarks.gpu --seconds 300                    stop starting sections after five minutes

Bandwidths are shares of a device-to-device copy measured in the same run, layers and networks ratios to torch's eager
BatchNorm2d + ReLU in the same run, interleaved, medians. No speed is reported when the correctness check fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anorm import create_model, create_norm, ops
from anorm.ops import reference, triton
from benchmarks.naive import WithAct, eager_bn, naive, networks

# ResNet-50
MAPS = [
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 28),
    (512, 28),
    (256, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
]
AN_MAPS = [(64, 56), (128, 28), (256, 14), (512, 7)]  # where ResNet-50 has AN
BATCH = 256
LAST = torch.channels_last
COPY_BYTES = 2**30
RESULTS: dict[str, dict] = {}


# ---- measuring -------------------------------------------------------------------------------------------------------


def milliseconds(functions: dict, rounds: int, calls: int) -> dict[str, float]:
    """Median time of a call; the functions take turns, so that a drifting clock meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def randn(*shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAST) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).to(memory_format=layout)


def note(section: str, name: str, value: float, goal: float | None = None, at_least: bool = True) -> None:
    """Record and print one figure; with a goal, whether it is reached."""
    verdict = "" if goal is None else ("  ok" if (value >= goal if at_least else value <= goal) else "  MISS")
    target = "" if goal is None else f"  ({'>=' if at_least else '<='} {goal})"
    RESULTS.setdefault(section, {})[name] = {
        "value": round(value, 4),
        "goal": goal,
        "missed": verdict.endswith("MISS"),
    }
    print(f"  {name:62s} {value:9.3f}{target}{verdict}", flush=True)


# ---- sections --------------------------------------------------------------------------------------------------------


def correctness() -> None:
    """Errors of passes and layers against float64, as a multiple of plain PyTorch's at the same precision."""
    for shape in ((4, 64, 56, 56), (3, 67, 7, 9), (2, 24, 1, 1), (8, 256, 14, 14)):
        for layout in (torch.contiguous_format, LAST):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                check_passes(shape, layout, dtype)
    for name in ("bn", "gn", "an", "se", "sn"):
        for dtype in (torch.float32, torch.bfloat16):
            check_layer(name, dtype)
    note("correctness", "passes and layers agree with float64", 1.0, 1.0)


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def check_passes(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy, r = (randn(*shape, dtype=dtype, layout=layout) for _ in range(3))
    c, s, b = torch.randn(shape[1], device="cuda"), *(torch.randn(shape[:2], device="cuda") for _ in range(2))
    wide = [t.double() for t in (x, c, s, b, r, dy)]
    rounding = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]

    def near(what: str, result: Tensor, exact: Tensor, bound: float) -> None:
        error = difference(result, exact)
        if not error <= bound:
            raise AssertionError(
                f"{what} {shape} {layout} {dtype}: relative error {error:.1e} above {bound:.1e}"
            )

    mean, var = triton.moments(x)
    for name, result, exact in zip(("mean", "var"), (mean, var), reference.moments(wide[0]), strict=True):
        if exact.any():  # the variance of a 1x1 map is 0
            near(name, result, exact, 2e-6)
    for act in ("none", "relu"):
        y = triton.affine(x, c, s, b, r, act)
        near("affine", y, reference.affine(wide[0], *wide[1:4], wide[4], act), 2 * rounding)
        own = triton.affine(x, c, s, b, None, act)
        g = wide[5] * ~(own <= 0) if act == "relu" else wide[5]
        dscale, dshift, _ = triton.affine_backward(dy, x, c, s, b, None, act)
        near("dshift", dshift, g.sum((2, 3)), 1e-5)
        near("dscale", dscale, (g * (wide[0] - wide[1][:, None, None])).sum((2, 3)), 1e-5)
        dx = triton.moments_backward(dy, x, c, s, b, mean, s, b, act)
        spread = [t[..., None, None] for t in (wide[2], mean.double(), wide[3])]
        near("dx", dx, spread[0] * g + spread[0] * (wide[0] - spread[1]) + spread[2], 2 * rounding)


def check_layer(name: str, dtype: torch.dtype) -> None:
    """The error of the Triton backend is at most twice that of plain PyTorch, plus one part in a hundred thousand."""
    torch.manual_seed(0)
    x, dy = randn(8, 64, 14, 14, dtype=dtype) + 1, randn(8, 64, 14, 14, dtype=dtype)
    results = {}
    layer = create_norm(name, 64, act="relu").cuda()
    for label, backend, precision in (
        ("exact", "reference", torch.double), ("plain", "reference", dtype), ("triton", "triton", dtype)
    ):  # fmt: skip
        twin = copy.deepcopy(layer).to(torch.double if precision == torch.double else torch.float32)
        leaf = x.detach().to(precision).requires_grad_()
        with ops.use_backend(backend):
            y = twin(leaf)
            y.backward(dy.to(precision))
        results[label] = [y.detach(), leaf.grad, *(p.grad for p in twin.parameters())]
    for i, (exact, plain, ours) in enumerate(
        zip(*(results[k] for k in ("exact", "plain", "triton")), strict=True)
    ):
        allowed = 2 * difference(plain, exact) + 1e-5
        if not difference(ours, exact) <= allowed:
            raise AssertionError(
                f"{name} {dtype}: result {i} has error {difference(ours, exact):.1e}, above {allowed:.1e}"
            )


def copy_unit() -> float:
    """Bytes a second (read and written) of a copy of 1 GiB."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.half, device="cuda").normal_()
    target = torch.empty_like(source)
    ms = milliseconds({"copy": lambda: target.copy_(source)}, 7, 5)["copy"]
    return 2 * COPY_BYTES / ms * 1e3


def passes() -> None:
    """Share of the copy's bandwidth of each pass, on buffers that together exceed the L2 cache several times."""
    unit = copy_unit()
    note("passes", "copy, GB/s", unit / 1e9)
    for dtype in (torch.bfloat16, torch.float16):
        for channels, size in MAPS:
            elements = BATCH * channels * size * size
            ring = [
                randn(BATCH, channels, size, size, dtype=dtype)
                for _ in range(max(2, 2**29 // (2 * elements)))
            ]
            c, s = torch.randn(channels, device="cuda"), torch.randn(BATCH, channels, device="cuda")
            turn = iter(range(10**9))

            def draw(ring=ring, turn=turn) -> Tensor:
                return ring[next(turn) % len(ring)]

            jobs = {
                "moments": (1, lambda: triton.moments(draw())),
                "affine + ReLU": (2, lambda c=c, s=s: triton.affine(draw(), c, s, c, None, "relu")),
                "affine_backward": (2, lambda c=c, s=s: triton.affine_backward(draw(), draw(), c, s, c, None, "relu")),
                "moments_backward": (
                    3, lambda c=c, s=s: triton.moments_backward(draw(), draw(), c, s, c, s, s, s, "relu"),
                ),
            }  # fmt: skip
            times = milliseconds({name: job for name, (_, job) in jobs.items()}, 7, 10)
            for name, (count, _) in jobs.items():
                share = count * elements * 2 / (times[name] * 1e-3) / unit
                large = elements * 2 >= 50e6
                note(
                    "passes",
                    f"{name} {channels}x{size}x{size} {str(dtype)[6:]}",
                    share,
                    0.85 if large else None,
                )


def layers() -> None:
    """Forward and backward of one layer, ratio to eager BN + in-place ReLU."""
    for dtype in (torch.float16, torch.bfloat16):
        ratios: dict[str, list[float]] = {}
        for channels, size in AN_MAPS:
            x = randn(BATCH, channels, size, size, dtype=dtype).requires_grad_()
            dy = randn(BATCH, channels, size, size, dtype=dtype)
            ours = {name: create_norm(name, channels, act="relu") for name in ("bn", "an", "gn", "se", "sn")}
            twins = {"eager": "bn", "naive AN": "an", "eager GN": "gn", "eager SE": "se", "naive SN": "sn"}
            modules = {name: naive(ours[law]) for name, law in twins.items()} | ours

            def job(module: nn.Module, x=x, dy=dy, dtype=dtype):
                module.cuda()
                parameters = list(module.parameters())

                def run() -> None:
                    with torch.autocast("cuda", dtype):
                        y = module(x)
                    torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))

                return run

            times = milliseconds({name: job(module) for name, module in modules.items()}, 7, 10)
            for name, ms in times.items():
                ratio = ms / times["eager"]
                ratios.setdefault(name, []).append(ratio)
                note("layers", f"{name} + ReLU {channels}x{size}x{size} {str(dtype)[6:]}", ratio)
        for name, values in ratios.items():
            goal = {"an": 0.85}.get(name)
            note(
                "layers",
                f"{name} + ReLU, geometric mean {str(dtype)[6:]}",
                statistics.geometric_mean(values),
                goal,
                False,
            )
        speedups = [n / a for n, a in zip(ratios["naive AN"], ratios["an"], strict=True)]
        note(
            "layers",
            f"naive AN / an, geometric mean {str(dtype)[6:]}",
            statistics.geometric_mean(speedups),
            5.0,
        )


def trainer(make, dtype: torch.dtype, compiled: bool = False):
    """One training step of a ResNet-50 on synthetic images."""
    torch.manual_seed(0)
    model = create_model("resnet50", norm=make).cuda().to(memory_format=LAST)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
    images, labels = randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,), device="cuda")
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


TRAINING_GOALS = {
    "AN, eager BN elsewhere": 1.0,
    "AN, everything fused": 1.08,
    "BN, everything fused": 1.08,
    "GN": 0.95,
    "SE": 0.95,
}


def training() -> None:
    """Images a second of a ResNet-50 step, ratio to eager BN."""
    for dtype in (torch.float16, torch.bfloat16):
        steps = {name: trainer(make, dtype) for name, make in networks().items()}
        times = milliseconds(steps, 5, 4)
        report_training(times, str(dtype)[6:])


def compiled_training() -> None:
    """The same against BN under torch.compile, which fuses what we fuse."""
    steps = {"eager BN": trainer(eager_bn, torch.float16), "compiled BN": trainer(eager_bn, torch.float16, True),
             "AN, everything fused": trainer("an", torch.float16)}  # fmt: skip
    times = milliseconds(steps, 5, 4)
    note(
        "compiled_training",
        "compiled BN / eager BN, images a second, float16",
        times["eager BN"] / times["compiled BN"],
    )
    ratio = times["compiled BN"] / times["AN, everything fused"]
    note("compiled_training", "AN, everything fused / compiled BN, images a second, float16", ratio, 0.97)


def report_training(times: dict[str, float], dtype: str) -> None:
    for name, ms in times.items():
        note("training", f"{name}, images/s, {dtype}", BATCH / ms * 1e3)
    for name, ms in times.items():
        note(
            "training",
            f"{name} / eager BN, images a second, {dtype}",
            times["eager BN"] / ms,
            TRAINING_GOALS.get(name),
        )


def folded(model: nn.Module) -> nn.Module:
    """BN of an eager ResNet-50 folded into its convolutions, for inference."""
    model = copy.deepcopy(model).eval()
    pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")]
    for module in list(model.modules()):
        for conv, norm in pairs:
            if isinstance(getattr(module, conv, None), nn.Conv2d) and isinstance(
                getattr(module, norm, None), WithAct
            ):
                after = getattr(module, norm)
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(module, conv), after.norm)
                setattr(module, conv, fused)
                after.norm = nn.Identity()
    return model


def inference() -> None:
    """A batch of 256 through AN, in half precision, against BN folded into its convolutions."""
    bn = create_model("resnet50", norm=eager_bn).cuda().eval()
    models = {
        "folded BN": folded(bn),
        "eager BN": bn,
        "AN, BN folded nowhere": create_model("resnet50", norm="an").cuda(),
    }
    mixed = create_model("resnet50", norm=networks()["AN, eager BN elsewhere"]).cuda()
    models["AN, other BN folded"] = folded(mixed)
    images = randn(BATCH, 3, 224, 224, dtype=torch.half)

    def job(model: nn.Module):
        model = model.eval().half().to(memory_format=LAST)

        @torch.inference_mode()
        def run() -> None:
            model(images)

        return run

    times = milliseconds({name: job(model) for name, model in models.items()}, 7, 5)
    for name, ms in times.items():
        goal = 1.05 if name == "AN, other BN folded" else None
        note(
            "inference", f"{name} / folded BN, time of a batch, float16", ms / times["folded BN"], goal, False
        )


SECTIONS = {f.__name__: f for f in (correctness, passes, layers, training, inference, compiled_training)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=480, help="start no section after this many seconds")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    if (reason := triton.available()) is not None or not torch.cuda.is_available():
        parser.error(f"this check needs a GPU and Triton: {reason or 'torch sees no GPU'}")
    begin = time.monotonic()
    import triton as compiler

    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": compiler.__version__,
               "allocator": torch.cuda.get_allocator_backend(), "batch": BATCH}  # fmt: skip
    print(json.dumps(machine))
    torch.backends.cudnn.benchmark = True
    failed = False
    ops.set_backend("triton")
    for name in dict.fromkeys(["correctness", *arguments.only]):  # no speed without correctness
        if time.monotonic() - begin > arguments.seconds:
            print(f"{name}: not run, {arguments.seconds:.0f} s are over")
            failed = True
            continue
        print(f"{name}: {(SECTIONS[name].__doc__ or '').partition(chr(10))[0]}", flush=True)
        try:
            SECTIONS[name]()
        except Exception as error:  # it is reported; the other sections still run
            failed = True
            RESULTS.setdefault(name, {})["error"] = f"{type(error).__name__}: {error}"
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
            if name == "correctness":
                break
        finally:
            torch.cuda.empty_cache()
            elapsed = round(time.monotonic() - begin)
            arguments.out.write_text(
                json.dumps({"machine": machine, "seconds": elapsed, **RESULTS}, indent=1)
            )
    print(f"{time.monotonic() - begin:.0f} s; written to {arguments.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
