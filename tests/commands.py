"""train.py and the tools, called as a user does: in this process for speed, or in processes of their own."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from anorm.build import create_network, create_task
from anorm.config.frozen import Config
from anorm.engine.record import read_metrics

ROOT = Path(__file__).parents[1]

# a whole run in about a second
SMALL = [
    "arch=resnet20",
    "norm=bn",
    "data=synthetic",
    "data.image_size=16",
    "data.num_classes=4",
    "data.train_images=64",
    "data.val_images=21",
    "batch_size=8",
    "optim.global_batch=16",
    "epochs=2",
    "schedule.warmup_epochs=0",
    "hardware=cpu",
    "hardware.threads=1",
    "log.tensorboard=false",
    "log.every=2",
]


def script(path):
    """The module of a script, by its path from the root."""
    name = path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def train(*arguments):
    """Exit status of train.py in this process."""
    return script("train.py").main(list(arguments))


def environment(**more):
    """One thread a process: tests measure no speed, and equal sums need equal threads."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


def start_train(*arguments, cwd=None, code=None, **more):
    """train.py, or ``code`` in its place, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if code else [str(ROOT / "train.py")]), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(**more),
        start_new_session=True,
    )


def start_torchrun(processes, *arguments):
    """train.py under torchrun, which is this process."""
    code = f"""if True:
        import sys
        from torch.distributed.run import main
        main(["--nproc-per-node={processes}", {str(ROOT / "train.py")!r}, *sys.argv[1:]])
    """
    return start_train(*arguments, code=code)


def run_train(*arguments, cwd=None, **more):
    """(status, stdout, stderr) of train.py in a process of its own."""
    process = start_train(*arguments, cwd=cwd, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def children_of(parent, word):
    """Process ids of the children whose command holds ``word``, in the order of their start."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            theirs = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if theirs == parent and word in command:
            found.append(int(pid))
    return sorted(found)


def ranks_of(launcher):
    """Process ids of the ranks of our launcher, in the order of their start."""
    return children_of(launcher, "spawn_main")


def events(folder, kind):
    return [line for line in read_metrics(folder) if line["event"] == kind]


def weights(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)


def network_of(config: Config, classes: int) -> torch.nn.Module:
    """The network that a run of ``config`` trains, on a data set of so many classes."""
    return create_network(config, create_task(config, [f"class {k}" for k in range(classes)]))


def cut_at(run, step, folder):
    """A copy of a finished run as a kill after ``step`` would have left it; the run kept its checkpoint of that step."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.ckpt", "*.safetensors", "*.npz"))
    older = {weights(run, path.name)["step"]: path for path in run.glob("last-*.ckpt")}
    shutil.copy(older[step], folder / "last.ckpt")
    log = folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[: weights(folder)["log_offset"]])
    return folder
