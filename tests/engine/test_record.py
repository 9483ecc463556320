"""The log and TensorBoard."""

import json
import resource

import pytest

from anorm.engine.record import Record, final_metrics, read_metrics


def test_a_log_spoiled_by_a_loss_of_power_is_read_to_there(tmp_path):
    lines = b'{"event": "start", "step": 0}\n{"event": "train", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines + b"\0" * 30 + b"\n" + lines)
    assert [line["event"] for line in read_metrics(tmp_path)] == ["start", "train"]
    assert final_metrics(tmp_path) is None


def test_a_line_of_the_log_is_written_whole_or_not_at_all(tmp_path):
    record = Record(tmp_path, tensorboard=False)
    record.write("start", step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (record.offset + 10, hard))  # as a disk with ten bytes left
    try:
        with pytest.raises(OSError, match="No space left"):
            record.write("train", step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record.write("train", step=2)
    record.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2]


def test_a_log_that_was_shortened_is_gone_on_with(tmp_path):
    record = Record(tmp_path, tensorboard=False, offset=1000)
    record.write("final", top1=1.0)
    record.close()
    assert final_metrics(tmp_path)["top1"] == 1.0


def test_a_resumed_run_keeps_its_points_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):
        record = Record(tmp_path, step=start)
        for step in (start + 1, start + 2):
            record.write("train", step=step, loss=float(step))
        record.write("eval", step=start + 2, top1=1.0)
        if not start:
            record.write("train", step=3, loss=9.0)  # of the part that the kill took
        record.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in read.Scalars("train/loss")] == [
        (s, s) for s in (1, 2, 3, 4)
    ]
    assert [point.step for point in read.Scalars("eval/top1")] == [2, 4]


def test_the_log_loses_what_a_kill_cut_off_and_continues_without_a_gap(tmp_path):
    record = Record(tmp_path, tensorboard=False)
    record.write("train", step=1, loss=1.0)
    kept = record.offset
    record.write("train", step=2, loss=float("nan"))
    record.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "tra')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert final_metrics(tmp_path) is None
    record = Record(tmp_path, tensorboard=False, offset=kept)
    record.write("train", step=2, loss=0.5)
    record.write("final", top1=1.0)
    record.close()
    assert [line.get("step") for line in read_metrics(tmp_path)] == [1, 2, None]
    assert final_metrics(tmp_path)["top1"] == 1.0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
