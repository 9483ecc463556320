"""The papers' tables of detection: numbers as data, sizes to the last printed digit, commands that compose."""

import re
from collections import Counter

import pytest

from anorm.config.frozen import Config
from anorm.study import detection
from anorm.study.printed import CONFIGS


@pytest.mark.parametrize("name", detection.names())
def test_rows_compose(name):
    table = detection.load(name)
    for row in table.rows:
        config = Config.compose(CONFIGS, list(row.overrides))
        assert config.settings.optim.global_batch == 16 and config.settings.optim.clip == 35
        epochs, milestones = (20, [16, 19]) if "coco_20e" in " ".join(row.overrides) else (24, [16, 22])
        assert (config.settings.epochs, config.settings.schedule.milestones) == (epochs, milestones)
        assert config.settings.schedule.warmup_steps == 500 and config.settings.schedule.warmup_from == pytest.approx(1 / 3)


def test_the_tables_hold_what_the_papers_print():
    rows = {name: len(detection.load(name).rows) for name in detection.names()}
    assert rows == {
        "table4": 19, "table5": 4, "v1_table2": 9, "v1_table3": 4, "v1_table4": 2, "detection_readme": 19,
    }  # fmt: skip
    # the distances that the text speaks of: AN above BN in box AP and mask AP
    table = {(r.label, r.backbone, r.head): r.printed for r in detection.load("table4").rows}
    for arch, box, mask in (("MobileNetV2", 1.8, 1.6), ("ResNet50", 1.6, 1.2), ("ResNet101", 1.7, 1.4)):
        bn, an = table[arch, "BN", "-"], table[arch, "AN (w/ BN)", "-"]
        assert (an[0] - bn[0], an[3] - bn[3]) == (pytest.approx(box), pytest.approx(mask))
    gn, an = table["ResNet50", "GN", "GN"], table["ResNet50", "AN (w/ BN)", "AN (w/ GN)"]
    assert (an[0] - gn[0], an[3] - gn[3]) == (pytest.approx(1.3), pytest.approx(1.7))


@pytest.mark.slow
def test_all_printed_sizes_are_explained():
    """22 in the ECCV paper: 19 equal, R101's AN a rounding, MobileNetV2's two not reachable."""
    words = Counter()
    for name in ("table4", "table5"):
        for row, _, verdict in detection.audit(detection.load(name)):
            if verdict:
                words[verdict.word] += 1
                assert (verdict.word == "misprint") == (row.label == "MobileNetV2")
                assert (verdict.word == "rounding") == (row.params == "65.15M")
    assert words == {"equal": 19, "rounding": 1, "misprint": 2}


def test_the_audit_of_a_table(capsys):
    from commands import script

    assert script("tools/audit.py").main(["v1_table4"]) == 0
    out = capsys.readouterr().out
    assert "| MobileNetV2 | BN | - | - | 23,152,885 | - | 34.2 |" in out
    assert re.search(r"`python train.py task=mask_rcnn .*arch=mobilenetv2 norm=an .*`", out)


def test_a_row_of_too_few_numbers_is_named(tmp_path):
    text = (detection.FOLDER / "table5.yaml").read_text().replace("44.4, ", "")
    (tmp_path / "table5.yaml").write_text(text)
    with pytest.raises(ValueError, match="ResNet101 has 5 numbers of 6"):
        detection.load("table5", tmp_path)
