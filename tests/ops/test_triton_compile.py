"""Every kernel compiled ahead of time for GPUs that need not be here, from the arguments the launchers really pass.

Checked in the machine code: no register spills on any GPU, and on sm_90 16-byte accesses to the feature map.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from anorm.ops.triton import laws as triton_laws
from anorm.ops.triton import passes as backend

compiler = pytest.importorskip("triton", reason="Triton is not installed")

if compiler.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anorm.ops.triton import coefficients as triton_coefficients
from anorm.ops.triton import kernels as triton_kernels

pytestmark = pytest.mark.skipif(
    "nvidia" not in compiler.backends.backends, reason="this Triton has no NVIDIA compiler"
)

CUOBJDUMP = Path(compiler.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
OPTIONS = ("num_warps", "enable_fp_fusion")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class Recorder:
    """Stands where the launchers find their kernels and notes what they would launch."""

    def __init__(self, module, launches):
        self.module, self.launches = module, launches

    def __getattr__(self, name):
        kernel = getattr(self.module, name)

        class Grid:
            def __getitem__(_, grid):
                return lambda *args, **named: self.launches.append((kernel, args, named))

        return Grid()


@pytest.fixture
def launches(monkeypatch, tmp_path):
    launches = []
    for launchers, kernels in ((backend, triton_kernels), (triton_laws, triton_coefficients)):
        monkeypatch.setattr(launchers, "_kernels", lambda kernels=kernels: Recorder(kernels, launches))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what was compiled before proves nothing
    return launches


def launch_all(shape, layout, dtype):
    """Every pass once, the activation's mask both recomputed from x and read from y."""
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    c, s = (torch.empty(size, dtype=precision, device="meta") for size in (shape[1], shape[:2]))
    backend._moments_impl(x)
    backend._affine_impl(x, c, s, c, None, "relu6")
    backend._affine_impl(x, c, s, c, x, "relu")
    backend._affine_backward_impl(x, x, c, s, c, "relu6")
    backend._affine_backward_residual_impl(x, x, c, s, c, x, "relu")
    backend._moments_backward_impl(x, x, c, s, c, s, s, s, "relu")


def launch_laws(n, c, k, groups):
    """The coefficients of every fused law, forward and backward."""
    cells, row, square, short = (torch.empty(size, device="meta") for size in ((n, c), (c,), (n, k), (k,)))
    network = (torch.empty(k, c, device="meta"),) * 3 + (short, short)
    triton_laws._bn(cells, cells, row, 49, 1e-5)
    triton_laws._bn_backward(cells, cells, row, row, 49)
    triton_laws._gn(cells, cells, row, groups, 1e-5)
    triton_laws._gn_backward(cells, cells, cells, cells, groups, 49)
    triton_laws._an(cells, cells, *network, 49, 1e-5, 1e-3, 1e-5)
    triton_laws._an_backward(cells, cells, cells, row, cells, row, cells, square, square, short, *network, 49)


def source(kernel, args, named):
    """What Triton's launcher would specialise on: types, constants, None and 1, divisibility by 16."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in named.items() if k not in OPTIONS
    }
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        elif kernel.params[i].is_constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
            continue
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(capability, launch, folder):
    """-> (Counter of SASS memory instructions, bytes of stack a thread): the stack is where spills go."""
    kernel, args, named = launch
    target = GPUTarget("cuda", capability, 32)
    binary = compiler.compile(
        source(kernel, args, named), target=target, options={option: named[option] for option in OPTIONS}
    )
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])

    def dump(what):
        return subprocess.run([CUOBJDUMP, what, file], capture_output=True, text=True, check=True).stdout

    stack = int(re.search(r"STACK:(\d+)", dump("-res-usage")).group(1))
    accesses = (
        Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)[\w.]*)", dump("-sass")))
        if capability >= 80
        else Counter()
    )
    return accesses, stack


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, dtype", [(70, torch.float16), (75, torch.float16), (80, torch.bfloat16), (90, torch.float16)]
)
def test_compiles_without_spills(capability, dtype, launches, tmp_path, record_property):
    launch_all((2, 64, 56, 56), "nhwc", dtype)
    assert len(launches) == 9, "one launch a pass, and a merge after each of the three split reductions"
    if capability in (70, 90):
        launch_laws(256, 256, 20, 32)
        assert len(launches) == 9 + 11, "at most three launches a law and direction"
    try:
        results = [compile_for(capability, launch, tmp_path) for launch in launches]
    except Exception as error:
        if capability >= 80:
            raise
        pytest.skip(f"Triton {compiler.__version__} does not compile for sm_{capability}: {error}")
    record_property("compiles", f"sm_{capability} with Triton {compiler.__version__}")
    for launch, (_, stack) in zip(launches, results, strict=True):
        assert stack == 0, f"{launch[0].__name__} spills {stack} bytes a thread on sm_{capability}"


# maps that each kernel reads and writes, in the order of launch_all
TRAFFIC = [("moments", 1, 0), ("affine", 1, 1), ("affine", 2, 1), ("affine_backward", 2, 0), ("affine_backward", 2, 1),
           ("moments_backward", 2, 1)]  # fmt: skip
WIDE = [
    ("nhwc", (256, 64, 56, 56), torch.bfloat16),
    ("nhwc", (256, 2048, 7, 7), torch.float32),
    ("nhwc", (256, 24, 28, 28), torch.float16),
    ("nchw", (256, 64, 28, 28), torch.bfloat16),
]


@pytest.mark.parametrize("layout, shape, dtype", WIDE)
def test_accesses_are_wide_on_sm_90(layout, shape, dtype, launches, tmp_path):
    """Every access to the map moves 16 bytes a thread."""
    launch_all(shape, layout, dtype)
    p = backend.plan(shape[0], shape[1], shape[2] * shape[3], layout == "nhwc")
    cells = p.block_r * p.block_c // (32 * p.warps)
    each = cells * dtype.itemsize // 16
    passes = [launch for launch in launches if not launch[0].__name__.startswith("merge")]
    for launch, (name, reads, writes) in zip(passes, TRAFFIC, strict=True):
        assert launch[0].__name__ == f"{name}_kernel"
        accesses, stack = compile_for(90, launch, tmp_path)
        assert stack == 0 and not any(op.startswith(("LDL", "STL")) for op in accesses)
        narrow = [op for op in accesses if re.search(r"\.(U8|S8|U16|S16|64)\b", op)]
        assert not narrow, f"{name}: {accesses}"
        assert accesses["LDG.E.128"] >= reads * each and accesses["STG.E.128"] == writes * each, (
            f"{name}: {accesses}"
        )


def test_float64_and_odd_sizes_compile(launches, tmp_path):
    launch_all((1, 67, 1, 1), "nchw", torch.float64)
    launch_all((1, 1, 5, 5), "nchw", torch.float32)
    for launch in launches:
        assert compile_for(80, launch, tmp_path)[1] == 0
