"""anorm/study/statistics.py against scipy and hand-computed cases; tools/judge.py on real runs."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from commands import ROOT, environment
from scipy import stats

from anorm.build import create_source
from anorm.study import compare, records, statistics
from anorm.tasks.classification import Classification

TOP1, READING, BEST = (
    Classification.metrics["top1"],
    records.Reading("top1"),
    records.Reading("top1", epoch="best"),
)


def flags(right, images):
    return np.arange(images) < right


def test_mean_interval_is_scipys():
    values = [75.1, 75.4, 75.0, 75.6]
    found = statistics.mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-12)
    assert found.sd == pytest.approx(np.std(values, ddof=1)) and found.n == 4


def test_mean_interval_by_hand():
    # mean 2, s = 1, t(2) = 4.302653, half = 4.302653 / sqrt(3)
    found = statistics.mean_interval([1, 2, 3])
    assert found.mean == 2 and found.half == pytest.approx(2.484138, abs=1e-6)
    assert 0 in found and -0.5 not in found and 4.5 not in found


def test_one_seed_has_no_interval():
    found = statistics.mean_interval([70.0])
    assert found.mean == 70 and math.isnan(found.low) and found.n == 1
    with pytest.raises(ValueError, match="no values"):
        statistics.mean_interval([])


def test_pooled_deviation_by_hand():
    # squares 2 and 0.5 over 2 + 1 degrees of freedom; the single value says nothing
    assert statistics.pooled_sd([[1, 2, 3], [5, 6], [9]]) == (pytest.approx(math.sqrt(2.5 / 3)), 3)
    assert statistics.pooled_sd([[1], [2]])[1] == 0


def test_noise_of_a_gap():
    # no deviation known: 1.96 * 0.16 * sqrt(2) for one seed against one printed number
    assert statistics.noise_of_gap([[70.0]], 1, 0.16) == pytest.approx(1.959964 * 0.16 * math.sqrt(2), rel=1e-6)
    samples = [[0.0, 1.0]] * 6  # s^2 = 0.5 on 6 degrees of freedom, t = 2.446912
    assert statistics.noise_of_gap(samples, 2) == pytest.approx(2.446912 * math.sqrt(0.5 * 1.5), rel=1e-6)


def test_mcnemar_by_hand():
    a = np.array([1] * 10 + [0] * 2 + [1] * 50 + [0] * 38, bool)
    b = np.array([0] * 10 + [1] * 2 + [1] * 50 + [0] * 38, bool)
    found = statistics.compare_pair(a, b)
    assert (found.only_a, found.only_b, found.agreement) == (10, 2, 0.88)
    assert found.difference.mean == -8
    # 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12 = 158 / 4096; (|10 - 2| - 1)^2 / 12 = 49 / 12
    assert found.p_exact == pytest.approx(158 / 4096)
    assert found.p_chi2 == pytest.approx(float(stats.chi2.sf(49 / 12, 1)))


def test_equal_results():
    a = flags(30, 100)
    found = statistics.compare_pair(a, a)
    assert found.p_exact == 1 and found.p_chi2 == 1 and found.agreement == 1
    assert (found.difference.low, found.difference.high) == (0, 0)


def test_paired_bootstrap_is_scipys():
    rng = np.random.default_rng(3)
    a, b = rng.random(2000) < 0.70, rng.random(2000) < 0.72
    found = statistics.compare_pair(a, b).difference
    expected = stats.bootstrap(
        (100 * (b.astype(float) - a),), np.mean, n_resamples=5000, method="percentile", rng=1
    ).confidence_interval
    # both are Monte Carlo: the error of a 2.5 % quantile of 5000 draws is about 0.04 standard errors of 1.4 points
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.15)


def test_wrong_results_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        statistics.compare_pair(flags(1, 3), flags(1, 4))
    with pytest.raises(ValueError, match="true or false"):
        statistics.compare_pair(np.ones(3), flags(1, 3))


def test_methods_paired_is_scipys():
    a, b = [70.0, 71.0, 72.5], [70.5, 71.4, 73.2]
    found = statistics.compare_methods(a, b, same_seeds=True)
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert found.paired and found.pairing_gain > 0.9 and found.settled
    assert found.p == pytest.approx(expected.pvalue) and found.difference.mean == pytest.approx(8 / 15)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))


def test_methods_unpaired_is_welch():
    a, b = [70.0, 71.0, 72.5, 70.2], [72.4, 70.9, 70.1]
    found = statistics.compare_methods(a, b, same_seeds=False)
    expected = stats.ttest_ind(b, a, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert not found.paired and found.pairing_gain is None and not found.settled
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))


def test_pairing_that_adds_variance_is_not_used():
    found = statistics.compare_methods([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], same_seeds=True)
    assert found.pairing_gain == pytest.approx(1 - 4 / 2) and not found.paired


def test_resampling_covers_images_and_seeds():
    rng = np.random.default_rng(0)
    a, b = rng.random((1, 4000)) < 0.7, rng.random((1, 4000)) < 0.7
    # copies of one run: seeds add nothing, so the interval is that of the images alone
    copies = statistics.resample(np.repeat(a, 3, 0), np.repeat(b, 3, 0), paired=True, resamples=4000)
    alone = statistics.compare_pair(a[0], b[0]).difference
    # standard error 1.0, Monte Carlo 0.04 of it
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high), abs=0.25)
    # seeds that differ: no image is drawn differently, so resampled means take only the values of drawn seeds
    ones, zeros = np.ones((2, 50), bool), np.zeros((2, 50), bool)
    mixed = np.array([[True] * 50, [False] * 50])
    assert (
        statistics.resample(zeros, mixed, paired=True).low == 0
        and statistics.resample(zeros, mixed, paired=True).high == 100
    )
    assert statistics.resample(zeros, ones, paired=False).low == 100
    with pytest.raises(ValueError, match="cannot be compared"):
        statistics.resample(ones, mixed[:, :10], paired=True)


@pytest.mark.parametrize(
    ("effect", "paired", "seeds"),
    [
        # tables of sample sizes for the two-sided t test at 5 % and 80 %: Cohen's d of two groups; d_z of pairs
        (0.5, False, 64),
        (0.8, False, 26),
        (1.0, False, 17),
        (0.5, True, 34),
        (0.8, True, 15),
        (1.0, True, 10),
    ],
)
def test_seeds_needed_are_the_textbooks(effect, paired, seeds):
    sd = 1.0 if paired else math.sqrt(2)
    assert statistics.seeds_needed(effect, sd, paired) == seeds
    assert statistics.detectable(seeds, sd, paired) <= effect < statistics.detectable(seeds - 1, sd, paired)


def test_power_is_that_of_simulated_tests():
    rng = np.random.default_rng(5)
    draws = rng.normal(0.3, 0.2, (4000, 4))
    found = np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
    # 4 standard errors of a share of 4000
    assert statistics.power(0.3, 4, 0.2, paired=True) == pytest.approx(found, abs=0.03)


@pytest.mark.parametrize(("shift", "freedom"), [(0.5, 2), (3.0, 4), (2.0, 30)])
def test_power_is_the_noncentral_t(shift, freedom):
    limit = stats.t.ppf(0.975, freedom)
    expected = stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift)
    # the mean over 4000 quantiles of the deviation
    assert statistics.power(shift / np.sqrt(freedom + 1), freedom + 1, 1.0, paired=True) == pytest.approx(
        expected, abs=5e-4
    )


def test_one_seed_detects_nothing():
    assert statistics.detectable(1, 0.16, paired=False) == math.inf
    assert statistics.seeds_needed(0.001, 0.2, paired=False) is None


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0] and statistics.holm([]) == []


def test_changes_by_class():
    a, b = np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 1]], bool)
    assert statistics.changes_by_class(a, b, np.array([0, 0, 2, 2])) == [(2, 100.0, 2), (0, -50.0, 2)]


def test_words():
    pair = statistics.compare_methods([70.0], [71.0], same_seeds=True)
    assert "one pair of runs" in statistics.words(pair, "bn", "an", TOP1) and "bn" in statistics.words(pair, "bn", "an", TOP1)
    noisy = statistics.compare_methods([70.0, 71.0, 72.0], [71.0, 70.5, 72.4], same_seeds=False)
    said = statistics.words(noisy, "bn", "an", TOP1)
    assert "inside the noise" in said and "0.2 points would need" in said and "find differences from" in said
    clear = statistics.compare_methods([70.0, 70.1, 70.2], [72.0, 72.1, 72.3], same_seeds=True)
    assert "an is better" in statistics.words(clear, "bn", "an", TOP1)
    corrected = statistics.words(clear, "bn", "an", TOP1, p=0.2)
    assert "inside the noise" in corrected and "Holm" in corrected


def test_bootstrap_can_withhold_a_verdict():
    clear = statistics.compare_methods([70.0, 70.1, 70.2], [72.0, 72.1, 72.3], same_seeds=True)
    assert clear.settled
    assert not dataclasses.replace(clear, bootstrap=statistics.Interval(2.0, -0.1, 4.0, 3)).settled


def test_two_norms_of_real_runs(trained):
    a, b = ([records.open_run(trained / f"{norm}-{seed}") for seed in (0, 1)] for norm in ("bn", "gn"))
    said = compare.report(a, b)
    images = np.stack([one["top1"] for one in records.images_of(b, READING)])
    assert images.shape == (2, 21)
    # the stored results are those of the final event
    assert 100 * images.mean(1) == pytest.approx([r.final["top1"] for r in b])
    expected = np.mean([r.final["top1"] for r in b]) - np.mean([r.final["top1"] for r in a])
    assert f"gn - bn = {expected:+.2f} points" in said
    assert "seeds [0, 1]" in said and "McNemar" in said


def test_a_class_that_gains_is_not_among_those_that_lose(trained):
    run = records.open_run(trained / "bn-0")
    label = run.images(READING)["label"]
    nothing, one = np.zeros((1, 21), dtype=bool), (label == 1)[None]
    changed = f"class 1 {{}}100.0 ({(label == 1).sum()} images)"
    assert compare._classes(run, label, nothing, one) == [f"gain most: {changed.format('+')}", "lose most: none"]
    assert compare._classes(run, label, one, nothing) == ["gain most: none", f"lose most: {changed.format('-')}"]


def test_what_pairing_does_is_said(trained, tmp_path):
    """The second seed of both methods is better than the first."""
    runs = {}
    for norm in ("bn", "gn"):
        shutil.copytree(trained / f"{norm}-1", tmp_path / norm)
        metrics = tmp_path / norm / "metrics.jsonl"
        events = [json.loads(line) for line in metrics.read_text().splitlines()]
        better = [e | {"top1": 100.0} if e["event"] in ("eval", "final") else e for e in events]
        metrics.write_text("".join(json.dumps(e) + "\n" for e in better))
        runs[norm] = [records.open_run(folder) for folder in (trained / f"{norm}-0", tmp_path / norm)]
    said = compare.report(runs["bn"], runs["gn"])
    assert re.search(r"^pairing lowers the variance by \d+%: equal seeds are paired$", said, re.M)


def test_unlike_protocols_are_refused(trained, tmp_path):
    shutil.copytree(trained / "bn-0", tmp_path / "other")
    config = (tmp_path / "other" / "config.yaml").read_text()
    (tmp_path / "other" / "config.yaml").write_text(config.replace("stats: running", "stats: batch"))
    metrics = tmp_path / "other" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"stats": "running"', '"stats": "batch"'))
    with pytest.raises(
        ValueError, match="unlike protocols .statistics: running statistics and batch statistics"
    ):
        compare.report([records.open_run(trained / "bn-0")], [records.open_run(tmp_path / "other")])
    card = json.loads((tmp_path / "other" / "data.json").read_text())
    assert records.open_run(trained / "bn-0").stamp(READING).image_size == card["image_size"] == 16


def changed(trained, folder, card=None, config=None, images=None):
    """A copy of a run, without its weights, that was evaluated otherwise."""
    folder.mkdir()
    for name in ("config.yaml", "data.json", "metrics.jsonl", "predictions.npz"):
        shutil.copy(trained / "bn-0" / name, folder)
    if card:
        held = json.loads((folder / "data.json").read_text())
        (folder / "data.json").write_text(json.dumps(held | card))
    if config:
        held = yaml.safe_load((folder / "config.yaml").read_text())
        for section, values in config.items():
            held[section] |= values
        (folder / "config.yaml").write_text(yaml.safe_dump(held))
    text = (folder / "metrics.jsonl").read_text()
    stats = (config or {}).get("eval", {}).get("stats", "running")
    text = text.replace('"stats": "running"', f'"stats": "{stats}"')
    if stats == "batch":  # as older versions wrote it
        text = text.replace('"set": "val", ', "")
    (folder / "metrics.jsonl").write_text(text.replace('"images": 21,', f'"images": {images or 21},'))
    return records.open_run(folder)


UNLIKE = {  # what of a stamp differs, and by what
    "data": {"card": {"images": "of another data set"}},
    "classes": {"card": {"classes": ["a", "b", "c"]}},
    "images": {"images": 20},
    "image_size": {"card": {"image_size": 48}},
    "resize": {"card": {"eval_resize": 40}},
    "interpolation": {"card": {"interpolation": "bicubic"}},
    "decoder": {"config": {"data": {"loader": "dali"}}},
    "statistics": {"config": {"eval": {"stats": "recalibrated"}}},
    "dtype": {"config": {"hardware": {"dtype": "fp16"}}},
}


@pytest.mark.parametrize("part", UNLIKE)
def test_every_part_of_a_protocol_keeps_numbers_apart(trained, tmp_path, part):
    run, other = records.open_run(trained / "bn-0"), changed(trained, tmp_path / "other", **UNLIKE[part])
    with pytest.raises(ValueError, match=rf"unlike protocols \({part}: [^;]+ and [^;]+\) and cannot be put"):
        compare.report([run], [other])


def test_stamps_of_last_and_best_epoch_and_of_averages_differ(trained, tmp_path):
    run = records.open_run(trained / "bn-0")
    with pytest.raises(ValueError, match="epoch: last and best"):
        records.one_stamp([run.stamp(READING), run.stamp(BEST)])
    assert run.value(BEST) == run.final["best_top1"]
    average = changed(trained, tmp_path / "other", config={"ema": {"decay": 0.9}}).stamp(records.Reading("top1", average=True))
    with pytest.raises(ValueError, match=r"weights: plain weights and average of weights \(decay 0.9\)"):
        records.one_stamp([run.stamp(READING), average])
    assert {*UNLIKE, "epoch", "weights", "set", "more", "batches"} == {part.name for part in dataclasses.fields(records.Stamp)}


def test_what_belongs_to_a_policy_of_statistics(trained, tmp_path):
    """Statistics of each batch depend on its size, those of several processes on how they are joined."""
    batches = [{"eval": {"stats": "batch", "batch_size": n}} for n in (4, 8)]
    joined = [{"hardware": {"processes": 2}, "dist": {"stats": how}} for how in ("mean", "rank0")]
    for configs, said in (
        (batches, "batches: batches of 4 and batches of 8"),
        (joined, r"statistics: running statistics \(mean over processes\) and .*\(rank0 over"),
    ):
        runs = [changed(trained, tmp_path / f"{said[:4]}-{i}", config=c) for i, c in enumerate(configs)]
        with pytest.raises(ValueError, match=said):
            records.one_stamp(run.stamp(READING) for run in runs)
    with pytest.raises(ValueError, match="there are no results"):
        records.one_stamp([])


def test_what_is_kept_of_each_image(trained):
    run = records.open_run(trained / "gn-1")
    val = create_source(run.config).val
    images = run.images(READING)
    assert images.data == val.identity and images["index"].tolist() == list(range(21))
    assert images["label"].tolist() == val.labels.tolist()
    assert images["top1"].dtype == bool
    assert np.array_equal(images["top1"], images["predicted"] == images["label"])
    assert 100 * images["top1"].mean() == pytest.approx(run.final["top1"])
    assert ((0.25 <= images["confidence"]) & (images["confidence"] <= 1)).all()  # of the first of four


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"data": np.array("another")}, "the data sets differ, noise-16-4 and another"),
        ({"index": np.arange(1, 22)}, "21 and 21 images, not the same ones"),
        ({"label": np.zeros(21, dtype=np.int64)}, "their labels differ"),
    ],
)
def test_runs_on_other_images_are_not_compared(trained, tmp_path, what, said):
    run, other = records.open_run(trained / "bn-0"), changed(trained, tmp_path / "other")
    with np.load(other.folder / "predictions.npz") as kept:
        held = dict(kept)
    np.savez(other.folder / "predictions.npz", **held | what)
    with pytest.raises(ValueError, match=rf"not evaluated on the same images \({said}\)"):
        compare.report([run], [other])


def test_results_that_do_not_say_of_which_images_they_are(trained, tmp_path):
    other = changed(trained, tmp_path / "other")
    np.savez(other.folder / "predictions.npz", index=np.arange(21), top1=np.ones(21, bool))
    with pytest.raises(ValueError, match="does not say which images it is of"):
        records.images_of([other], READING)
    (other.folder / "predictions.npz").unlink()
    with pytest.raises(ValueError, match="has no predictions.npz"):
        records.images_of([records.open_run(other.folder)], READING)


def test_as_a_program(trained, tmp_path):
    def judged(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "tools" / "judge.py", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )

    done = judged(trained / "bn-0", trained / "gn-0")
    assert done.returncode == 0 and "one pair of runs" in done.stdout and "protocol: 21 images" in done.stdout
    wrong = judged(trained / "bn-0")
    assert wrong.returncode == 2 and "two run folders" in wrong.stderr
