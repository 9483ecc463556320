"""tools/audit.py and anorm/study/printed.py: the papers' tables as data, true sizes, verdicts."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import anorm
from anorm.config.frozen import Config
from anorm.ops import use_backend
from anorm.study import audit, printed, sizes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audited():
    return {name: audit.audit(printed.load(name)) for name in printed.names()}


def counted(arguments):
    return sizes.size_of(Config.compose(printed.CONFIGS, arguments))


def row(audited, table, label, group=""):
    return next(a for a in audited[table] if a.row.label == label and group in a.row.group)


# measured on the authors' public code: number of parameters
TRUE = {
    ("table2", "ResNet34+BN"): 21_797_672,
    ("table2", "ResNet34+AN"): 21_996_060,
    ("table2", "ResNet50-BN"): 25_557_032,
    ("table2", "ResNet50-AN"): 25_755_420,
    ("table2", "ResNet50-SE"): 28_071_976,
    ("table2", "ResNet101-BN"): 44_549_160,
    ("table2", "ResNet101-AN"): 45_000_644,
    ("table2", "DenseNet121-BN"): 7_978_856,
    ("table2", "DenseNet121-AN"): 8_342_288,
    ("table2", "MobileNetV2-BN"): 3_504_872,
    ("table2", "MobileNetV2-AN"): 3_672_760,
    ("table2", "AOGNet12M-BN"): 12_259_099,
    ("table2", "AOGNet12M-AN"): 12_373_355,
    ("table2", "AOGNet40M-BN"): 40_153_004,
    ("table2", "AOGNet40M-AN"): 40_388_880,
    ("table3", "ResNet50-SE (BN2)"): 26_185_768,
    ("table3", "ResNet50-SE (All)"): 29_329_448,
    ("table3", "ResNet50-AN (w/BN3)"): 26_349_084,
    ("table3", "ResNet50-AN (All)"): 26_745_860,
    ("table1", "(mean,std) + A2 + hsigmoid + K=(10,10,20,20)"): 25_823_900,
    ("table1", "RSD + A1 + hsigmoid + K=(10,10,20,20)"): 25_755_170,
    ("table1", "RSD + A2 + hsigmoid + K=(5,5,10,10)"): 25_652_450,
    ("table1", "RSD + A2 + hsigmoid + K=(20,20,40,40)"): 25_961_360,
    ("table1", "* RSD + A2 + hsigmoid + K=(10,10,20,20)"): 26_947_472,
}

# and of multiply-adds in G: convolutions and linear layers; with norms and ReLUs
FLOPS = {
    "ResNet34+BN": (3.664, 3.682),
    "ResNet50-BN": (4.089, 4.143),
    "ResNet101-BN": (7.801, 7.881),
    "DenseNet121-AN": (2.834, 2.913),
    "MobileNetV2-BN": (0.301, 0.334),
    "AOGNet12M-BN": (2.108, 2.189),
    "AOGNet40M-BN": (7.351, 7.506),
}

MISPRINTS = {
    ("table1", "RSD + A2 + relu + K=(10,10,20,20)", ""): "K=(20,20,40,40)",
    ("table1", "RSD + A2 + hsigmoid + K=(5,5,10,10)", ""): "K=(10,10,20,20)",
    ("table2", "ResNet34+AN", ""): "without its mixtures",
    ("table2", "†ResNet50-SE", ""): "biases",
    ("table2", "ResNet50-SE", ""): "biases",
    ("table2", "ResNet101-BN", "Vanilla"): "deep stem",
    ("table2", "MobileNetV2-AN", ""): "K=10 in all stages",
    ("table2", "ResNet50-BN", "State"): "repeats the vanilla row",
    ("table2", "ResNet50-AN", "State"): "repeats the vanilla row",
    ("table2", "ResNet101-AN", "State"): "repeats the vanilla row",
    ("table3", "ResNet50-SE (BN3)", ""): "biases",
    ("table3", "ResNet50-AN (All)", ""): "without AN's mixtures",
}


def test_true_sizes(audited):
    for (table, label), number in TRUE.items():
        assert row(audited, table, label).size.all == number, label
    deep = {
        "ResNet50-BN": 25_576_264,
        "ResNet50-AN": 25_774_652,
        "ResNet101-BN": 44_568_392,
        "ResNet101-AN": 45_019_876,
    }
    for label, number in deep.items():
        assert row(audited, "table2", label, "State").size.all == number, label


def test_true_flops(audited):
    for label, expected in FLOPS.items():
        size = row(audited, "table2", label).size
        # the references have three decimals
        assert (size.macs / 1e9, size.thop / 1e9) == pytest.approx(expected, abs=0.0012), label


def test_known_misprints_are_found_and_no_others(audited):
    found = {
        (t, a.row.label, a.row.group): a.params.reason
        for t in ("table1", "table2", "table3")
        for a in audited[t]
        if a.params.word == "misprint"
    }
    assert len(found) == len(MISPRINTS)
    for (table, label, group), reason in MISPRINTS.items():
        assert any(
            t == table and name == label and group in g and reason in why
            for (t, name, g), why in found.items()
        ), label
    assert row(audited, "table1", "* RSD + A2 + hsigmoid + K=(10,10,20,20)").params.word == "rounding"
    flops = {
        (a.row.label, a.row.group[:7]) for a in audited["table2"] if a.flops and a.flops.word == "misprint"
    }
    assert flops == {
        ("ResNet101-BN", "The Van"),
        ("ResNet101-AN", "The Van"),
        ("ResNet50-BN", "The Sta"),
        ("ResNet50-AN", "The Sta"),
    }


def test_every_deviation_has_a_reason(audited):
    for rows in audited.values():
        for a in rows:
            for verdict in (a.params, a.flops):
                assert verdict is None or bool(verdict.reason) == (
                    verdict.word in ("misprint", "convention")
                ), a.row.label


def test_after_the_code(audited):
    row = printed.load("table2").rows[1]
    assert (
        row.command("code")
        == "python train.py setup=vanilla arch=resnet34 norm=an faithful=code norm.place=published"
    )
    assert counted(row.arguments("code")).all == 21_996_060


@pytest.mark.parametrize("norm", ["bn", "an", "se", "sn"])
def test_the_count_is_that_of_the_network_itself(norm):
    """Laws and convolutions on the meta device against FlopCounterMode on a forward pass with numbers."""
    model = anorm.create_model("resnet18", norm).eval()
    with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    size = counted(["arch=resnet18", f"norm={norm}"])
    assert size.macs == counter.get_total_flops() // 2
    assert size.all == sum(p.numel() for p in model.parameters())


def test_verdicts():
    said = printed.Counted("why not", "leaf")
    assert audit.judge("25.76M", 25_755_420, None) == audit.Verdict("equal")
    assert audit.judge("25.76M", 25_754_999, None) == audit.Verdict("rounding")
    assert audit.judge("25.76M", 25_774_000, None) == audit.Verdict("rounding")
    assert audit.judge("25.76M", 25_652_450, None).word == "misprint"
    assert str(audit.judge("25.76M", 25_652_450, (said, 25_760_001))) == "misprint: why not: 25.760 M"
    assert (
        audit.judge("3.68G", 3_664_000_000, (replace(said, count="thop"), 3_682_000_000)).word == "convention"
    )
    assert audit.judge("0.335G", 335_499_999, None).word == "equal"
    with pytest.raises(ValueError, match="was to be explained"):
        audit.judge("25.76M", 25_652_450, (said, 25_600_000))


def test_markdown_and_csv_parse_back(audited):
    table = printed.load("table3")
    lines = [
        line
        for line in audit.markdown(table, audited["table3"], "paper").splitlines()
        if line.startswith("| ")
    ]
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    assert {len(c) for c in cells} == {len(audit.COLUMNS)}
    assert [c[0] for c in cells if c[0] not in ("Method", "---")] == [r.label for r in table.rows]
    parsed = list(csv.DictReader(io.StringIO(audit.as_csv(audited, "paper"))))
    assert len(parsed) == sum(map(len, audited.values()))
    one = next(p for p in parsed if p["table"] == "table3" and p["method"] == "ResNet50-AN (All)")
    assert (
        one["params"] == "26745860"
        and one["params_verdict"] == "misprint"
        and one["printed_params"] == "25.92M"
    )
    assert one["command"] == "python train.py arch=resnet50 setup=vanilla norm=an norm.place=block"


@pytest.mark.parametrize("name", printed.names())
def test_tables_are_complete(name):
    table = printed.load(name)
    assert table.rows and table.title and table.source and table.section and table.metrics == ("top1", "top5")
    # SE twice: quoted and trained
    assert len({(r.group, r.label, r.overrides) for r in table.rows}) >= len(table.rows) - 1
    for r in table.rows:
        assert r.params.endswith("M") and (r.flops is None or r.flops.endswith("G"))
        assert 15 < r.values["top1"] < 30 and 4 < r.values["top5"] < 10
        assert not r.mark or r.label.startswith(r.mark)
    for difference in table.differences:
        assert {"what", "paper", "code"} <= set(difference) <= {"what", "paper", "code", "key"}


def test_printed_gaps_are_those_of_the_printed_errors():
    """The arrows of Table 2 are distances to the AN row of their network, or a note says so."""
    for name in ("table2", "table3"):
        table = printed.load(name)
        for r in table.rows:
            if not r.gaps:
                continue
            family = r.label.lstrip("†").replace("+", "-").split("-")[0]
            best = next(
                b
                for b in table.rows
                if b.group == r.group
                and not b.gaps
                and "AN" in b.label
                and b.label.replace("+", "-").startswith(f"{family}-")
            )
            printed_gap = r.gaps["top1"]
            right = abs(r.values["top1"] - best.values["top1"] - printed_gap) < 0.0101  # one in the last printed digit
            assert right or "gaps are as printed" in r.note, (r.label, r.values, best.values)


def test_unknown_tables_and_keys(tmp_path):
    with pytest.raises(ValueError, match="no table 'table9'; there are table1"):
        printed.load("table9")
    text = (printed.TABLES / "table3.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("top1: 22.35", "topp1: 22.35"))
    with pytest.raises(ValueError, match="wrong.yaml.*topp1"):
        printed.load("wrong", tmp_path)
    with pytest.raises(ValueError, match="neither paper nor code"):
        printed.load("table1").rows[0].arguments("other")


def test_as_a_program(tmp_path):
    out = tmp_path / "sizes.csv"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "audit.py", "table3", "--csv", out],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "25.92M" in done.stdout and "26,745,860" in done.stdout and "misprint" in done.stdout
    assert len(out.read_text().splitlines()) == 7
    wrong = subprocess.run(
        [sys.executable, ROOT / "tools" / "audit.py", "table9"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2 and "table9" in wrong.stderr


@pytest.mark.slow
def test_the_kept_sizes_are_those_of_this_code():
    configs = [config for name in printed.names() for config in audit.networks(printed.load(name))]
    assert sizes.kept() == json.loads(json.dumps(sizes.to_keep(configs))), "run python scripts/sizes.py"


def test_a_kept_size_counts_while_its_code_is_unchanged(monkeypatch):
    config = Config.compose(printed.CONFIGS, ["arch=resnet20", "norm=an"])
    true = sizes.size_of(config, 10, 32)
    code = {"algebra.py": sizes._digest("algebra.py"), "norms/gone.py": sizes._digest("norms/gone.py")}
    entry = {"size": [1, 2, 3, 4], "code": ["algebra.py"]}
    kept = {"code": code, "sizes": {sizes.signature(config, 10, 32): entry}}
    monkeypatch.setattr(sizes, "kept", lambda: kept)
    assert sizes.size_of(config, 10, 32) == sizes.Size(1, 2, 3, 4) != true
    assert sizes.size_of(config.having(norm={"k": 3}), 10, 32) != sizes.Size(1, 2, 3, 4)
    kept["code"] = {"algebra.py": code["norms/gone.py"]}
    assert sizes.size_of(config, 10, 32) == true


def test_the_code_of_a_size_is_all_that_it_was_counted_with():
    _, code = sizes._counted(json.dumps([{"name": "aognet12m"}, {"name": "se"}]), 10, 64)
    assert {"archs/aognet.py", "archs/aog.py", "norms/squeeze_excite.py", "norms/batch.py", "algebra.py"} <= set(code)
    assert not {"archs/resnet.py", "norms/attentive.py"} & set(code)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("# word\ndef f(x):\n    \"\"\"Other words.\"\"\"\n    return (x + 1)\n", True),
        ("def f(x):\n    return x + 2\n", False),
        ("def f(y):\n    return y + 1\n", False),
        ("def f(x):\n    return x - 1\n", False),
    ],
)
def test_words_leave_the_version_of_code_as_it_is(tmp_path, monkeypatch, change, same):
    monkeypatch.setattr(sizes, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text('def f(x):\n    """Words."""\n    return x + 1\n')
    (tmp_path / "b.py").write_text(change)
    assert (sizes._digest("a.py") == sizes._digest("b.py")) == same
    sizes._digest.cache_clear()
