"""Hydra's grammar on our command line: a form has its effect or is refused in words; none is taken without effect."""

import pytest
from commands import ROOT, SMALL, run_train, script, train

from anorm.config.compose import choices, sweep
from anorm.config.frozen import Config

CONFIGS = ROOT / "configs"
NORMS = choices(CONFIGS, "norm")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("hydra.run.dir=out", "use run_dir=FOLDER"),
        ("hydra.sweep.dir=out", "use run_dir=FOLDER"),
        ("hydra.job.chdir=true", "cd FOLDER first"),
        ("hydra/launcher=joblib", "use --submit slurm"),
        ("+hydra.verbose=true", "have no effect"),
        ("hydra=other", "have no effect"),
        ("norm@other=bn", "norm=CHOICE"),
        ("norm@norm:other=bn", "norm=CHOICE"),
        ("+arch@extra=resnet18", "arch=CHOICE"),
        ("norm/sub=bn", "norm=CHOICE"),
        ("~norm", "set norm=null instead"),
        ("~optim.clip", "set optim.clip=null instead"),
        ("norm.name=gn", "chosen by norm=gn"),
        ("++data.name=digits", "chosen by data=digits"),
        ("norm=[bn,gn]", "unknown norm"),
        ("norm=null", "unknown norm"),
        ("norm=", "has no value"),
        ("norm={name:bn}", "unknown norm"),
        ("seed=0,1", "add -m"),
        ("seed=range(0,3)", "add -m"),
        ("seed=choice(0,1)", "add -m"),
        ("norm=glob(*)", "add -m"),
        ("optim.lr=interval(0,1)", "add -m"),
        ("norm.k=[5,5", "cannot read"),
        ("seed", "give key=value"),
        ("=3", "give key=value"),
        ("optim={lr:0.1}x", "cannot read"),
        ("optim=3", "optim is a section"),
        ("optim.lr=${seeds}", "does not compose"),
        ("optim.lr=???", "optim.lr"),
    ],
)
def test_forms_without_effect_are_refused(capsys, argument, words):
    assert train("--cfg", "job", argument) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and words in said.err and said.out == "", said


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("+seed=3", "seed", 3),
        ("++seed=3", "seed", 3),
        ("seed=int(3.0)", "seed", 3),
        ("epochs=${batch_size}", "epochs", 128),
        ("run_dir='a b'", "run_dir", str(ROOT / "a b")),
        ('run_dir="x=1"', "run_dir", str(ROOT / "x=1")),
        ("run_dir=x=1, (2)", "run_dir", str(ROOT / "x=1, (2)")),
        ("freeze=[norm,'layer1.*']", "freeze", ["norm", "layer1.*"]),
        ("optim.args={betas:[0.9,0.95]}", "optim", None),
    ],
)
def test_forms_with_effect(monkeypatch, argument, key, value):
    monkeypatch.chdir(ROOT)
    settings = Config.compose(CONFIGS, [argument]).settings
    if key == "optim":
        assert settings.optim.args == {"betas": [0.9, 0.95]}
    else:
        assert getattr(settings, key) == value


@pytest.mark.parametrize(
    ("argument", "jobs"),
    [
        ("norm=bn,gn", ["norm=bn", "norm=gn"]),
        ("norm=choice(bn,gn)", ["norm=bn", "norm=gn"]),
        ("norm=glob(*)", [f"norm={name}" for name in NORMS]),
        ("norm=glob(an*)", ["norm=an", "norm=an_gn"]),
        ("norm=glob([a*,bn],exclude=af*)", ["norm=an", "norm=an_gn", "norm=asrn", "norm=bn"]),
        ("seed=range(0,3)", ["seed=0", "seed=1", "seed=2"]),
        ("seed=range(0,6,step=3)", ["seed=0", "seed=3"]),
        ("seed=sort(2,1,reverse=true)", ["seed=2", "seed=1"]),
        ("optim.lr=0.1,1e-3", ["optim.lr=0.1", "optim.lr=0.001"]),
        ("norm.k=[5,5],[10,10]", ["norm.k=[5,5]", "norm.k=[10,10]"]),
        ("optim.args={a:1},{a:2}", ["optim.args={a:1}", "optim.args={a:2}"]),
        ("arch.zero_init=true,false", ["arch.zero_init=True", "arch.zero_init=False"]),
        ("freeze=[norm,an]", ["freeze=[norm,an]"]),
        ("run_dir='a,b'", ["run_dir='a,b'"]),
        ("weights=null,w.pth", ["weights=null", "weights=w.pth"]),
    ],
)
def test_sweeps(argument, jobs):
    assert [job for (job,) in sweep(CONFIGS, [argument])] == jobs
    assert len(sweep(CONFIGS, [argument, "seed=0,1"])) == 2 * len(jobs)


def test_quoted_values_of_a_sweep_stay_whole():
    jobs = [job for (job,) in sweep(CONFIGS, ["run_dir='a,b','c d'"])]
    assert [Config.compose(CONFIGS, [job]).settings.run_dir.rpartition("/")[2] for job in jobs] == ["a,b", "c d"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("optim.lr=interval(0,1)", "an interval has no end of values"),
        ("seed=glob(*)", r"glob\(\) is for the choices of"),
        ("norm=glob(none*)", "names nothing to run"),
        ("seed=range(0,0)", "names nothing to run"),
        ("hydra.sweeper.n_jobs=2", "no effect"),
    ],
)
def test_sweeps_that_name_no_jobs_are_refused(argument, words):
    with pytest.raises(ValueError, match=words):
        sweep(CONFIGS, [argument])


def test_a_sweep_over_a_glob_runs(tmp_path):
    status, out, err = run_train("-m", *SMALL, "epochs=1", "norm=glob([bn,gn])", cwd=tmp_path)
    assert (status, out.count("  done  ")) == (0, 2), err
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "runs").iterdir()) == ["bn", "gn"]


def test_one_value_is_changed_at_a_time(trained, capsys):
    run = str(trained / "bn-0")
    assert script("tools/validate.py").main([run, "eval.stats=running,batch"]) == 2
    assert "a list is [a,b]" in capsys.readouterr().err
    assert script("tools/validate.py").main([run, "eval.stats=[running,batch]"]) == 0
    assert script("tools/validate.py").main([run, "norm=gn"]) == 2
    assert "a run keeps its norm" in capsys.readouterr().err
    assert script("tools/validate.py").main([run, "norm.name=gn"]) == 2
    assert script("tools/validate.py").main([run, "hydra.run.dir=x"]) == 2
