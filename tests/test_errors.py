"""Every mistake of a user: exit status 2 and one or two lines that say what to do; nothing is overwritten."""

import sys

import pytest
import torch
from commands import SMALL, run_train, script, train
from PIL import Image


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A run that starts after all leaves its folder there."""
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments):
    """The message of a command line that must be refused."""
    assert train(*arguments) == 2
    message = capsys.readouterr().err
    assert 1 <= len(message.strip().splitlines()) <= 2, message
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["norm=attn"], ["unknown norm 'attn'", "an"]),
        (["arch=resnet5"], ["unknown arch 'resnet5'", "resnet50"]),
        (["arch=timm:resnt18"], ["timm has no model 'resnt18'", "resnet18"]),
        (["arch=torchvison:resnet18"], ["unknown arch 'torchvison:resnet18'", "torchvision:NAME"]),
        (["arch=resnet18", "norm=timm:frn"], ["arch=timm:NAME", "norm=module"]),
        (["setup=vanila"], ["vanilla"]),
        (["epoch=3"], ["unknown key epoch", "epochs"]),
        (["lr=0.1"], ["optim.lr"]),
        (["optim.lrate=1"], ["unknown key optim.lrate", "lr"]),
        (["norm.kk=3"], ["unknown key norm.kk", "k"]),
        (["arch.zero_gamma=true"], ["unknown key arch.zero_gamma", "zero_init"]),
        (["data=digits", "data.max_shfit=2"], ["unknown key data.max_shfit", "max_shift"]),
        (["optim=sgd"], ["optim is a section", "name"]),
        (["optim.name=sdg"], ["optim.name", "sgd"]),
        (["epochs=many"], ["epochs='many'", "whole number"]),
        (["epochs=1.5"], ["epochs=1.5", "whole number"]),
        (["optim.lr=fast"], ["optim.lr='fast'", "a number"]),
        (["epochs=0"], ["epochs=0", "above 0"]),
        (["batch_size=-1"], ["batch_size=-1", "above 0"]),
        (["seed=-1"], ["seed=-1"]),
        (["optim.lr=0"], ["optim.lr=0", "above 0"]),
        (["eval.stats=runing"], ["eval.stats", "running"]),
        (["resume=maybe"], ["resume=maybe", "auto", "never"]),
        (["hardware.dtype=fp8"], ["hardware.dtype", "fp16"]),
        (["faithful=both"], ["paper", "code"]),
        (["epochs=4", "schedule.warmup_epochs=5"], ["warmup_epochs"]),
        (["norm"], ["key=value"]),
        (["norm=bn,an"], ["-m"]),
        (["~seed"], ["deleted"]),
        (["--multi"], ["--multirun"]),
        (["--cfg"], ["--cfg job"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--cfg", "job", "-m"], ["--cfg job", "-m"]),
        (["norm=BN"], ["unknown norm 'BN'", "did you mean bn"]),
        (["norm.k=[5,5"], ["""'norm.k="[5,5"'"""]),
    ],
)
def test_mistakes_in_the_command_line(capsys, arguments, words):
    complete = [] if arguments[0].startswith(("--", "norm", "arch")) else ["data=digits"]
    message = refused(capsys, *complete, *arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["norm=an", "norm.k=[10,10,20,20]"], ["k has 4 numbers", "3 stages"]),
        (["arch=timm:resnet18", "arch.foo=1"], ["timm:resnet18", "'foo'"]),
        (["arch=timm:convnext_atto"], ["no BatchNorm2d"]),
        (["arch=timm:resnet18", "norm=timm:nope"], ["timm has no norm layer 'nope'"]),
        (["arch=timm:resnet18", "norm=timm:groupnorm", "norm.groups=3"], ["timm:groupnorm", "'groups'"]),
        (["norm=an", "norm.k=0"], ["k=0", "positive"]),
        (["norm=gn", "norm.groups=7"], ["16 channels", "7"]),
        (["norm=an", "batch_size=1"], ["batch", "2"]),
        (["norm=an", "norm.sync=true", "batch_size=1"], ["batch", "2"]),  # nothing to pool over: one process
        (["norm=module", "norm.target=torch.nn.BatchNorm2d", "norm.sync=true"], ["BatchNorm2d", "norm=bn"]),
        (
            ["norm=module", "norm.target=torch.nn.BatchNorm2d", "eval.stats=batch"],
            ["eval.stats=batch", "BatchNorm2d", "recalibrated"],
        ),
        (["batch_size=3"], ["batch_size=4", "optim.global_batch"]),
        (["hardware.processes=3"], ["hardware.processes=2", "optim.global_batch"]),
        (["hardware=gpu"], ["no GPU", "hardware=cpu"]),
        (["hardware.dtype=fp16"], ["fp16", "fp32"]),
        (["data.image_size=0"], ["data.image_size=0", "at least 1"]),
        (["data.train_images=8"], ["8 images", "optim.global_batch"]),
        (["norm=module"], ["norm.target"]),
        (["norm=module", "norm.target=torch.nn.Nothing"], ["norm.target", "torch.nn.Nothing"]),
        (["weights=nowhere.ckpt"], ["nowhere.ckpt"]),
        (["freeze=[layer9.*]"], ["freeze=layer9.*", "mixtures"]),
        (["freeze=[*]"], ["no parameter"]),
        (["optim.impl=apex"], ["NVIDIA", "optim.impl=auto"]),
        (["optim.args={betas:[0.9,0.99]}"], ["betas", "sgd"]),
    ],
)
def test_what_cannot_be_built(capsys, tmp_path, arguments, words):
    if torch.cuda.is_available() and arguments == ["hardware=gpu"]:
        pytest.skip("there is a GPU")
    message = refused(capsys, *SMALL, f"run_dir={tmp_path / 'run'}", *arguments)
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or "batch_size=1" in arguments


def image_folder(root, classes=("cat", "dog"), count=8, size=40):
    """ROOT/{train,val}/CLASS/N.png of one colour a class."""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (size, size), (90 * number, 20 * i, 50)).save(
                    root / split / name / f"{i}.png"
                )
    return root


FOLDER = [
    *SMALL[:2],
    "data=imagefolder",
    "data.image_size=32",
    "data.cache=false",
    *SMALL[7:],
    "hardware.workers=0",
]


def test_data_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    assert "data.root" in refused(capsys, "norm=an")
    assert "nowhere" in refused(capsys, "norm=an", "data.root=nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "empty" in refused(capsys, "norm=an", f"data.root={tmp_path / 'empty'}")
    differing = image_folder(tmp_path / "differing")
    (differing / "val" / "dog").rename(differing / "val" / "wolf")
    message = refused(capsys, *FOLDER, f"data.root={differing}")
    assert "dog" in message and "wolf" in message


def test_a_file_that_is_no_image(capsys, tmp_path):
    root = image_folder(tmp_path / "set")
    (root / "train" / "cat" / "0.png").write_bytes(b"not an image at all")
    run = tmp_path / "run"
    message = refused(capsys, *FOLDER, f"data.root={root}", f"run_dir={run}")
    assert "0.png" in message and "data.on_error=skip" in message


def test_files_that_are_passed_over_are_listed_once(capsys, tmp_path, monkeypatch):
    """Also those that an earlier part of the run met. And the data are found from any folder."""
    root, run = image_folder(tmp_path / "set"), tmp_path / "run"
    for split in ("train", "val"):
        (root / split / "cat" / "0.png").write_bytes(b"not an image at all")
    here = [
        *FOLDER,
        "data.root=set",
        "data.on_error=skip",
        "batch_size=4",
        "optim.global_batch=4",
        f"run_dir={run}",
    ]
    assert train(*here) == 0
    said = capsys.readouterr()
    assert f"2 unreadable images were replaced or left out: {run / 'unreadable.txt'}" in said.out
    lines = (run / "unreadable.txt").read_text().splitlines()
    assert [line.split(" is not")[0] for line in lines] == [
        f"train: {root}/train/cat/0.png",
        f"val: {root}/val/cat/0.png",
    ]
    assert all(line.endswith("(no image file)") for line in lines)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert script("tools/validate.py").main([str(run), "data.on_error=skip"]) == 0
    assert "(15 images" in capsys.readouterr().out


def test_an_evaluation_that_fails_again_and_again_leaves_the_older_checkpoints(capsys, tmp_path):
    root, run = image_folder(tmp_path / "set"), tmp_path / "run"
    (root / "val" / "cat" / "0.png").write_bytes(b"not an image at all")
    arguments = [*FOLDER, "epochs=1", "batch_size=4", "optim.global_batch=4", "checkpoint.every_steps=1"]
    for _ in range(4):
        assert "0.png" in refused(capsys, *arguments, f"data.root={root}", f"run_dir={run}")
        kept = [torch.load(run / f"last{age}.ckpt", weights_only=True)["step"] for age in ("", "-1", "-2")]
        assert kept == [4, 3, 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(*SMALL, "epochs=1", f"run_dir={folder}") == 0
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_with_a_finished_run_of_another_configuration(capsys, finished):
    before = contents(finished)
    message = refused(capsys, *SMALL, "epochs=1", "seed=1", f"run_dir={finished}")
    assert "finished run" in message and "seed: 0 there, 1 now" in message and "run_dir" in message
    assert contents(finished) == before


def test_a_checkpoint_of_another_architecture_or_a_truncated_one(capsys, tmp_path, finished):
    run = f"run_dir={tmp_path / 'run'}"
    message = refused(capsys, *SMALL, "arch=resnet50", run, f"weights={finished / 'last.ckpt'}")
    assert "layer1.0.conv3.weight" in message
    whole = (finished / "weights.safetensors").read_bytes()
    for name, content in (
        ("short.safetensors", whole[:1000]),
        ("short.ckpt", (finished / "best.ckpt").read_bytes()[:1000]),
    ):
        (tmp_path / name).write_bytes(content)
        assert name in refused(capsys, *SMALL, run, f"weights={tmp_path / name}")


def test_a_truncated_checkpoint_stops_the_run_that_would_continue_from_it(capsys, tmp_path):
    run = tmp_path / "run"
    small = [*SMALL, "epochs=1", f"run_dir={run}"]
    assert train(*small) == 0
    capsys.readouterr()
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(metrics[:-1]) + "\n")  # as if killed before the last line
    (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:5000])
    before = contents(run)
    message = refused(capsys, *small)
    assert "last.ckpt" in message and "damaged" in message and "resume=never" in message
    assert contents(run) == before


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be", "lower batch_size"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "lower batch_size"),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to", "lower batch_size"),
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "lower hardware.workers"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "docker run --shm-size"),
    ],
)
def test_errors_of_memory_say_what_to_lower(words, remedy, capsys):
    """Words of torch 2.15 and of CUDA, which a test cannot bring about here."""
    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        raise RuntimeError(words)
    assert outcome.status == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and remedy in message and len(message.splitlines()) == 1


def test_another_number_of_processes_under_synchronized_statistics_is_another_run(capsys, tmp_path):
    synced = [*SMALL, "norm=bn", "norm.sync=true", "epochs=1", f"run_dir={tmp_path / 'run'}"]
    assert train(*synced) == 0
    capsys.readouterr()
    message = refused(capsys, *synced, "hardware.processes=2")
    assert "hardware.processes: 1 there, 2 now" in message


def test_a_folder_in_use(capsys, tmp_path):
    import multiprocessing

    from anorm.engine.checkpoint import FolderLock

    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()

    def hold():
        lock = FolderLock(tmp_path / "run")
        lock.take_all()
        lock.keep(5)
        held.set()
        done.wait(60)

    other = context.Process(target=hold)
    other.start()
    held.wait(60)
    try:
        assert "in use" in refused(capsys, *SMALL, f"run_dir={tmp_path / 'run'}")
    finally:
        done.set()
        other.join()


def test_torch_and_torchvision_that_do_not_match(tmp_path):
    """Stands in for the real pair by a torchvision whose import fails as theirs does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    status, _, err = run_train(
        "norm=bn",
        f"data.root={image_folder(tmp_path / 'set')}",
        "data=imagefolder",
        "hardware=cpu",
        "batch_size=4",
        "optim.global_batch=4",
        f"run_dir={tmp_path / 'run'}",
        "hardware.workers=0",
        PYTHONPATH=f"{tmp_path}",
    )
    assert status == 2
    assert "torch and torchvision do not belong together" in err and len(err.strip().splitlines()) <= 2


def test_a_real_process_ends_with_status_2_and_no_traceback():
    status, out, err = run_train("norm=attn")
    assert (
        status == 2 and out == "" and err.startswith("error: unknown norm 'attn'") and "Traceback" not in err
    )


def test_a_bug_keeps_its_traceback(monkeypatch):
    module = sys.modules["train"]
    monkeypatch.setattr(module, "composed", lambda arguments: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        train("data=digits")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=mask_rcnn", "data=digits"], "task=mask_rcnn takes images with objects, and data=digits has images with one"),
        (["data=shapes"], "task=classification takes images with one class each, and data=shapes has images with objects"),
    ],
)
def test_a_task_says_which_data_it_takes(words, said, capsys):
    assert train(*words, "hardware=cpu", "arch=resnet18", "norm=bn") == 2
    assert said in capsys.readouterr().err
