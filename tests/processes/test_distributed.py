"""Several processes over gloo, started in every way that a machine without GPUs can."""

import itertools
import os
import re
import signal
import time

import pytest
import torch
from commands import (
    ROOT,
    SMALL,
    children_of,
    events,
    ranks_of,
    run_train,
    script,
    start_torchrun,
    start_train,
    train,
    weights,
)
from PIL import Image
from safetensors.torch import load_file

TWO = "hardware.processes=2"
# four steps an epoch of 2 x 8 images
FP64 = [*SMALL, "hardware.dtype=fp64"]


def final_weights(folder, *arguments):
    if TWO in arguments:
        status, _, err = run_train(*arguments, f"run_dir={folder}")
        assert status == 0, err
    else:
        assert train(*arguments, f"run_dir={folder}") == 0
    return weights(folder)["model"], events(folder, "eval")[-1]


def assert_close(a, b, statistics=True):
    """Equal to float64 rounding: sums of a few thousand terms of order one, over eight steps."""
    assert a.keys() == b.keys()
    for key in a:
        if statistics or "running" not in key and "tracked" not in key:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm",
    [["norm=gn"], ["norm=bn", "norm.sync=true", "arch.zero_init=true"], ["norm=an", "norm.sync=true"]],
    ids=lambda n: n[0],
)
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, norm):
    """Also in evaluation, of 21 images on two processes: nothing padded, nothing counted twice. And where synchronized
    norms start at zero, which another framework lost points by.
    """
    one, evaluated_by_one = final_weights(tmp_path / "one", *FP64, *norm, "batch_size=16")
    two, evaluated_by_two = final_weights(tmp_path / "two", *FP64, *norm, "batch_size=8", TWO)
    assert_close(one, two)
    assert evaluated_by_one["images"] == evaluated_by_two["images"] == 21
    assert evaluated_by_one["loss"] == pytest.approx(evaluated_by_two["loss"], rel=1e-9)
    assert evaluated_by_one["top1"] == evaluated_by_two["top1"]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "an"])
def test_statistics_of_each_process_equal_one_process_that_accumulates(tmp_path, norm):
    one, _ = final_weights(tmp_path / "one", *FP64, f"norm={norm}")
    two, _ = final_weights(tmp_path / "two", *FP64, f"norm={norm}", TWO)
    assert_close(one, two, statistics=False)


@pytest.mark.slow
def test_running_statistics_are_joined_by_mean_or_rank_0(tmp_path, capsys):
    """For evaluation, for release and in every checkpoint; those of each process are kept, to be joined otherwise."""
    arguments = [*FP64, TWO, "epochs=1", "ema.decay=0.9", "checkpoint.every_steps=2"]
    mean, evaluated = final_weights(tmp_path / "mean", *arguments)
    rank0, by_rank0 = final_weights(tmp_path / "rank0", *arguments, "dist.stats=rank0")
    assert_close(mean, rank0, statistics=False)
    name = next(key for key in mean if key.endswith("running_mean"))
    assert not torch.allclose(mean[name], rank0[name])
    last, third_step = weights(tmp_path / "mean"), weights(tmp_path / "mean", "last-1.ckpt")
    assert (last["step"], third_step["step"]) == (4, 3)
    for kept in ("buffers", "ema_buffers"):
        assert all(torch.equal(a, b) for a, b in zip(*last["processes"][kept], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(*third_step["processes"][kept], strict=True))
    number = [key for key in third_step["model"] if "running" in key or "tracked" in key].index(name)
    for entry, kept in (("model", "buffers"), ("ema", "ema_buffers")):
        one, other = (buffers[number] for buffers in third_step["processes"][kept])
        torch.testing.assert_close(third_step[entry][name], (one + other) / 2, rtol=1e-12, atol=0)

    for folder, released in itertools.product(("mean", "rank0"), ("weights", "weights_ema")):
        state = weights(tmp_path / folder)["ema" if released == "weights_ema" else "model"]
        saved = load_file(tmp_path / folder / f"{released}.safetensors")
        assert all(torch.equal(value, saved[key]) for key, value in state.items())

    for folder, stats, expected in (
        ("mean", "rank0", by_rank0),
        ("mean", "mean", evaluated),
        ("rank0", "mean", evaluated),
    ):
        assert script("tools/validate.py").main([str(tmp_path / folder), f"dist.stats={stats}"]) == 0
        assert f"loss {expected['loss']:.6f} " in capsys.readouterr().out
    assert f"{evaluated['loss']:.6f}" != f"{by_rank0['loss']:.6f}"
    for file in ("best.ckpt", "weights.safetensors"):
        assert script("tools/validate.py").main([str(tmp_path / "mean" / file), "dist.stats=rank0"]) == 2
        assert "does not hold the statistics of each process" in capsys.readouterr().err


LONG = [
    *SMALL,
    "arch=mobilenetv2",
    "arch.dropout=0.3",
    "data.train_images=384",
    "mix.mixup=0.2",
    TWO,
    "checkpoint.every_steps=2",
    "log.every=1",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    final_weights(folder, *LONG)
    return folder


def assert_same_run(a, b):
    one, other = weights(a)["model"], weights(b)["model"]
    assert all(torch.equal(one[key], other[key]) for key in one)
    for kind, keys in (("train", ("step", "loss", "lr")), ("eval", ("step", "top1", "top5", "loss"))):
        assert [[line[key] for key in keys] for line in events(a, kind)] == [
            [line[key] for key in keys] for line in events(b, kind)
        ]


def logged(folder):
    """The last step in the log, which an earlier part of the run may have written."""
    return max((line["step"] for line in events(folder, "train")), default=0)


def wait_for_step(process, folder, step):
    while process.poll() is None and logged(folder) < step:
        time.sleep(0.02)
    assert process.poll() is None


def wait_until_gone(pids):
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.slow
def test_kills_are_noticed_and_the_same_command_continues(uninterrupted, tmp_path):
    """One run, killed in four ways on its way."""
    folder = tmp_path / "run"
    for number, victim in enumerate(("launcher", "rank 0", "rank 1", "all")):
        before = logged(folder)
        process = start_train(*LONG, f"run_dir={folder}")
        wait_for_step(process, folder, before + 5)  # there is a newer checkpoint
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        if victim == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            pid = {"launcher": process.pid, "rank 0": ranks[0], "rank 1": ranks[1]}[victim]
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=240)
        wait_until_gone(ranks)
        if victim.startswith("rank"):
            assert process.returncode == 1
            assert f"process {victim[-1]} (of 0 to 1) was killed by signal 9" in err
            assert "Repeat the command" in err
        assert number == 0 or "continuing at step" in out
    status, out, err = run_train(*LONG, f"run_dir={folder}")
    assert status == 0, err
    assert "continuing at step" in out
    assert_same_run(uninterrupted, folder)


@pytest.mark.slow
def test_four_processes_continue_bit_for_bit(tmp_path):
    """More than two sum a gradient in an order that depends on where it lies."""
    four = [
        *SMALL,
        "hardware.processes=4",
        "batch_size=4",
        "epochs=6",
        "checkpoint.every_steps=3",
        "log.every=1",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_train(*four, f"run_dir={whole}")[0] == 0
    process = start_train(*four, f"run_dir={cut}")
    wait_for_step(process, cut, 8)
    ranks = ranks_of(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=240)
    wait_until_gone(ranks)
    status, out, err = run_train(*four, f"run_dir={cut}")
    assert status == 0, err
    assert "continuing at step" in out
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_a_signal_during_an_evaluation_costs_the_evaluation_alone(tmp_path):
    folder, arguments = tmp_path / "run", [*SMALL, TWO, "epochs=1", "data.val_images=6000"]
    process = start_train(*arguments, f"run_dir={folder}")
    while process.poll() is None and not (folder / "last.ckpt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "everything is saved" in out + err
    assert time.monotonic() - sent < 30  # what Slurm and torch's launcher wait
    assert weights(folder)["step"] == 4 and not events(folder, "eval")
    status, out, err = run_train(*arguments, f"run_dir={folder}")
    assert status == 0, err
    assert "continuing at step 4 of 4" in out
    assert [line["images"] for line in events(folder, "eval")] == [6000]


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_at_one_step(uninterrupted, tmp_path):
    """One run, stopped in three ways on its way."""
    folder = tmp_path / "run"
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        before = logged(folder)
        process = start_train(*LONG, "checkpoint.every_steps=0", f"run_dir={folder}")
        wait_for_step(process, folder, before + 3)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=240)
        assert process.returncode == 128 + getattr(signal, name), err
        assert "everything is saved" in out + err
        assert weights(folder)["step"] >= before + 3
    status, _, err = run_train(*LONG, f"run_dir={folder}")
    assert status == 0, err
    assert_same_run(uninterrupted, folder)


@pytest.mark.slow
def test_a_signal_where_torchs_launcher_does_not_expect_it(tmp_path):
    """Its metrics read a clock first, and a signal just then leaves them with a name that has no value."""
    folder, now = tmp_path / "run", tmp_path / "now"
    code = f"""if True:
        import os, signal, sys, time, train
        from torch.distributed.elastic.metrics import api
        class Clock:
            def time():
                if os.path.exists({str(now)!r}) and sys._getframe(1).f_code.co_name == "wrapper":
                    os.remove({str(now)!r})
                    os.kill(os.getpid(), signal.SIGTERM)
                return time.time()
        api.time = Clock
        sys.exit(train.main(sys.argv[1:]))
    """
    process = start_train(*LONG, "checkpoint.every_steps=0", f"run_dir={folder}", code=code)
    try:
        wait_for_step(process, folder, 3)
        now.touch()
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "everything is saved" in out and "Traceback" not in err
    assert weights(folder)["step"] >= 3


@pytest.mark.slow
def test_another_number_of_processes_continues_with_the_same_batches(tmp_path):
    one, _ = final_weights(tmp_path / "one", *FP64, "norm=gn")
    folder = tmp_path / "changed"
    process = start_train(
        *FP64, "norm=gn", TWO, "log.every=1", "checkpoint.every_steps=1", f"run_dir={folder}"
    )
    while process.poll() is None and not (folder / "last.ckpt").exists():
        time.sleep(0.01)
    ranks = ranks_of(process.pid)
    process.kill()
    process.communicate()
    wait_until_gone(ranks)
    status, out, err = run_train(*FP64, "norm=gn", f"run_dir={folder}")
    assert status == 0, err
    if events(folder, "start")[-1]["processes"] == 1 and len(events(folder, "start")) > 1:
        assert "continuing with 1 instead of 2 processes" in out
    assert_close(one, weights(folder)["model"])


@pytest.mark.slow
def test_torchrun(tmp_path):
    ours, _ = final_weights(tmp_path / "ours", *SMALL, TWO)
    process = start_torchrun(2, *SMALL, f"run_dir={tmp_path / 'theirs'}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    theirs = weights(tmp_path / "theirs")["model"]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert out.count("run folder:") == 1


def tasks_of_srun(number, *arguments, code=None):
    """Two, with the environment that srun gives them; ``code`` instead of train.py."""
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(number), "SLURM_STEP_NODELIST": "localhost"}
    return [
        start_train(*arguments, code=code, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **slurm) for i in (0, 1)
    ]


@pytest.mark.slow
def test_srun(tmp_path):
    for task in tasks_of_srun(4242, *SMALL, f"run_dir={tmp_path / 'run'}"):
        _, err = task.communicate(timeout=300)
        assert task.returncode == 0, err
    assert len(events(tmp_path / "run", "final")) == 1
    assert events(tmp_path / "run", "start")[0]["processes"] == 2


def test_a_mistake_under_another_launcher_ends_every_task_with_status_2(tmp_path):
    errors = []
    for task in tasks_of_srun(4243, "norm=attn"):
        errors.append(task.communicate(timeout=300)[1])
        assert task.returncode == 2
    assert sum("unknown norm 'attn'" in err for err in errors) == 1


def test_an_error_of_one_task_ends_it_at_once_under_another_launcher(tmp_path):
    """It waits for nobody: the others are in a collective that it will not join."""
    for split, count in (("train", 16), ("val", 2)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (9 * i, 0, 99)).save(tmp_path / split / "cat" / f"{i}.JPEG")
    (tmp_path / "train/cat/3.JPEG").write_bytes(b"damaged")
    arguments = [
        "data=imagefolder", f"data.root={tmp_path}", "data.image_size=16", "arch=resnet20", "norm=bn", "epochs=1",
        "schedule.warmup_epochs=0", "batch_size=4", "optim.global_batch=8", "hardware=cpu", "hardware.workers=0",
        "hardware.threads=1", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    tasks = tasks_of_srun(4244, *arguments)
    ends = [(task.communicate(timeout=120)[1], task.returncode) for task in tasks]
    told = [status for err, status in ends if "3.JPEG is not a readable image" in err]
    assert told == [2]
    assert all(status for _, status in ends)  # gloo's connection to it broke


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_in_words(tmp_path):
    impatient = """if True:
        import datetime, sys, train
        from anorm.processes import world
        world.TIMEOUT = datetime.timedelta(seconds=20)
        sys.exit(train.main(sys.argv[1:]))
    """
    folder = tmp_path / "run"
    tasks = tasks_of_srun(4245, *SMALL, "epochs=500", "log.every=1", f"run_dir={folder}", code=impatient)
    try:
        wait_for_step(tasks[0], folder, 3)
        tasks[1].send_signal(signal.SIGSTOP)
        _, err = tasks[0].communicate(timeout=120)
    finally:
        for task in tasks:
            task.kill()
    tasks[1].communicate()
    assert tasks[0].returncode == 1
    assert "another process did not answer" in err and "Traceback" not in err and "Repeat the command" in err


@pytest.mark.slow
def test_processes_that_torchrun_left_alone_end(tmp_path):
    """Its death, unlike that of our own launcher, sends them nothing."""
    folder = tmp_path / "run"
    process = start_torchrun(2, *SMALL, "epochs=500", "log.every=1", f"run_dir={folder}")
    wait_for_step(process, folder, 3)
    ranks = children_of(process.pid, "train.py")
    assert len(ranks) == 2
    process.kill()
    wait_until_gone(ranks)
    assert not (folder / "last.ckpt").exists() or weights(folder)["step"] % 4 == 0  # saved by no last will
    process.communicate(timeout=60)


def test_a_rank_that_meets_a_mistake_reports_it_once(tmp_path):
    status, _, err = run_train(*SMALL, TWO, "norm=gn", "norm.groups=7", f"run_dir={tmp_path / 'run'}")
    assert status == 2
    assert err.count("error:") == 1 and "7" in err and len(err.strip().splitlines()) <= 2


def test_an_error_that_nobody_foresaw_shows_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import os, torch\n"
        "class Norm(torch.nn.BatchNorm2d):\n"
        "    def forward(self, x):\n"
        "        if os.environ['RANK'] == '1':\n"
        "            raise RuntimeError('an illegal memory access was encountered')\n"
        "        return super().forward(x)\n"
    )
    process = start_train(
        *SMALL, TWO, "norm=module", "norm.target=broken.Norm", f"run_dir={tmp_path / 'run'}",
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RuntimeError: an illegal memory access was encountered" in err and "broken.py" in err
    assert "ended with status 1; see its traceback above" in err  # of it, or of the one it left


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_two_processes(tmp_path):
    status, _, err = run_train(*SMALL, TWO, "optim.lr=1e30", f"run_dir={tmp_path / 'run'}")
    assert status == 1
    assert re.search(r"not finite at step \d+", err) and err.count("error:") == 1
