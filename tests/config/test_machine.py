"""What is decided for machines that are not this one."""

import os
import subprocess

import pytest
import torch
from commands import ROOT

from anorm import __main__ as main
from anorm.config.machine import FOR_V100, Machine, decide
from anorm.config.settings import Hardware
from anorm.processes.launch import slurm_environment
from anorm.processes.world import World

OLD = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")  # as builds for CUDA 12.6 have
NEW = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")  # as builds for CUDA 13 have


def v100s(kernels=OLD):
    return Machine(8, 80, (7, 0), "Tesla V100-SXM2-32GB", kernels)


def test_eight_v100s_train_in_fp16_by_eight_processes():
    found = decide(Hardware(), machine=v100s())
    assert (found.device, found.processes, found.dtype, found.channels_last) == ("gpu", 8, "fp16", True)
    assert (found.workers, found.threads) == (8, 10)


@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_what_a_v100_cannot_compute_is_refused_with_the_reason(dtype):
    with pytest.raises(ValueError, match=rf"{dtype} needs .* 8\.0 .* V100.* has 7\.0 .* use fp16 or fp32"):
        decide(Hardware(dtype=dtype), machine=v100s())
    assert decide(Hardware(dtype=dtype), machine=Machine(8, 80, (8, 0), "A100", OLD)).dtype == dtype


def test_a_torch_without_kernels_for_v100s_says_what_to_install():
    with pytest.raises(ValueError, match=r"no kernels for Tesla V100.*7\.0.*2\.14.*R580") as refused:
        decide(Hardware(), machine=v100s(NEW))
    assert FOR_V100 in str(refused.value)
    assert decide(Hardware(device="cpu"), machine=v100s(NEW)).device == "cpu"


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((8, 9), NEW, True),  # sm_86 runs on 8.9
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
        ((12, 1), ("compute_120",), True),
        ((6, 1), NEW, False),
        ((9, 0), (), True),  # nothing known
        ((9, 4), ("gfx942",), True),  # not NVIDIA's
    ],
)
def test_which_kernels_run_where(capability, kernels, runs):
    assert (Machine(1, 1, capability, "a GPU", kernels).without_kernels is None) == runs


def test_the_report_knows_v100s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(NEW))
    rows = dict(main.devices())
    assert "no bf16" in rows["cuda:1"] and FOR_V100 in rows["cuda:1"] and "R580" in rows["cuda:1"]
    assert Machine.here() == Machine(2, len(os.sched_getaffinity(0)), (7, 0), "Tesla V100", NEW)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(OLD))
    assert "install" not in dict(main.devices())["cuda:1"]


@pytest.mark.parametrize(
    ("capability", "special"), [("7.0", True), ("8.0", False), ("17.0", False), (None, False)]
)
def test_make_installs_a_torch_that_runs_on_v100s(tmp_path, capability, special):
    program = tmp_path / "nvidia-smi"
    answer = "exit 9" if capability is None else f"echo {capability}\necho {capability}"
    program.write_text(f'#!/bin/sh\ntest "$1" = --query-gpu=compute_cap || exit 1\n{answer}\n')
    program.chmod(0o755)
    venv = tmp_path / "venv"
    told = subprocess.run(
        ["make", "-n", f"VENV={venv}", f"{venv}/.test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    ).stdout
    installs = [line for line in told.splitlines() if "pip install" in line]
    assert len(installs) == (3 if special else 2) and "[train]" in installs[-2]
    assert (",dali-cuda12," in installs[-1]) == special and (",dali," in installs[-1]) != special
    assert (FOR_V100.removeprefix("pip install ") in installs[0]) == special


def started_by_srun(monkeypatch, **slurm):
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    for key, value in slurm_environment(os.environ).items():
        monkeypatch.setenv(key, value)
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def test_tasks_of_srun_share_a_node_or_have_their_own_part_of_it(monkeypatch):
    whole = Machine(8, 64, (7, 0), "V100", OLD)
    found = decide(Hardware(), started_by_srun(monkeypatch, **STEP).size, whole)
    assert (found.processes, found.workers, found.threads) == (16, 8, 8)
    # --cpus-per-task: Slurm has bound the task to its cores
    bound = Machine(8, 6, (7, 0), "V100", OLD)
    found = decide(Hardware(), started_by_srun(monkeypatch, SLURM_CPUS_PER_TASK="6").size, bound)
    assert (found.workers, found.threads) == (6, 6)


def test_a_task_of_srun_that_sees_its_own_gpu_alone(monkeypatch):
    one = Machine(1, 8, (7, 0), "V100", OLD)
    world = started_by_srun(monkeypatch, **STEP)
    with pytest.raises(ValueError, match="there are 1 GPUs"):
        decide(Hardware(), world.size, one)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert decide(Hardware(), world.size, one).processes == 16
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert world.on("gpu").device == torch.device("cuda", 0)
