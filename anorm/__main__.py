"""python -m anorm: what is installed, which backend runs, what is wrong and how to mend it.

    python -m anorm           the report
    python -m anorm build     compile the C++ of this package ahead of the first use
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator

import torch

import anorm
from anorm import ops
from anorm.config.machine import Machine
from anorm.data import jpeg

PARTS = {
    "torchvision": ("data and images, tools/", "train"),
    "timm": ("optimizers, norm=timm:NAME, arch=timm:NAME", "train"),
    "hydra": ("train.py", "train"),
    "sklearn": ("data=digits", "train"),
    "tensorboard": ("event files", "train"),
    "safetensors": ("release weights", "train"),
    "rich": ("the progress display", "train"),
    "onnxruntime": ("tools/export.py", "export"),
    "nvidia.dali": ("data.loader=dali", "dali"),
    "submitit": ("Slurm", "slurm"),
}
DISTRIBUTIONS = {"hydra": "hydra-core", "sklearn": "scikit-learn"}


_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def versions() -> Iterator[tuple[str, str]]:
    yield "anorm", anorm.__version__
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    for module, (purpose, extra) in PARTS.items():
        try:
            importlib.import_module(module)
            yield module, importlib.metadata.version(_distribution(module))
        except ModuleNotFoundError:
            yield module, f"not installed; for {purpose}: pip install 'anorm[{extra}]'"
        except importlib.metadata.PackageNotFoundError:
            yield module, "installed, version unknown"
        except RuntimeError as error:
            yield module, f"cannot be imported: {_mismatch(error)}"


def _distribution(module: str) -> str:
    """The name of the package that brings a module; DALI has one for each release of CUDA."""
    if module == "nvidia.dali":
        return next((name for name in _DALI if _installed(name)), _DALI[0])
    return DISTRIBUTIONS.get(module, module)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _mismatch(error: RuntimeError) -> str:
    first = str(error).splitlines()[0]
    return f"{first} (torch and {first.split('::')[0].split()[-1]} are of different builds: install both from one index)"


def devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no driver or no device is visible"
        yield "gpu", f"none: {built}"
    for index in range(torch.cuda.device_count()):
        capability, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
        found = Machine(1, 1, capability, name, tuple(torch.cuda.get_arch_list()))
        text = f"{name}, compute capability {capability[0]}.{capability[1]}"
        if capability < (8, 0):
            text += "; fp16 and fp32, no bf16 and no tf32"
        yield f"cuda:{index}", f"{text}; {found.without_kernels}" if found.without_kernels else text


def backends() -> Iterator[tuple[str, str]]:
    for name in ops.BACKENDS[1:]:
        reason = ops.why_not(name)
        yield name, "usable" if reason is None else f"not usable: {reason}"
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield "auto", f"{ops.resolve(device).__name__.split('.')[-1]} for {device} tensors"


def decoders() -> Iterator[tuple[str, str]]:
    reason = jpeg.why_not()
    yield "JPEG regions", "usable" if reason is None else f"not usable, whole images are decoded: {reason}"


def report() -> None:
    parts = {"installed": versions(), "devices": devices(), "backends": backends(), "decoders": decoders()}
    for title, rows in parts.items():
        print(title)
        for name, text in rows:
            print(f"  {name:<12} {text}")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        print("no C++ compiler: the cpu backend cannot be built (apt install g++); the reference backend runs instead")


def build() -> int:
    reason = ops.why_not("cpu")
    print("cpu kernels: ready" if reason is None else f"cpu kernels: {reason}; the reference backend runs instead")
    reason = jpeg.why_not()
    print("JPEG regions: ready" if reason is None else f"JPEG regions: {reason}; whole images are decoded instead")
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["build"]:
        return build()
    if arguments:
        print(__doc__)
        return 0 if arguments[0] in ("-h", "--help") else 2
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
