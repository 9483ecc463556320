"""A run opened for looking at: it is evaluated as it evaluates itself."""

from commands import SMALL, train

from anorm.inside.subject import open_subject


def test_under_batch_statistics_images_come_in_the_batches_of_the_run(tmp_path):
    """Class by class, as the set lies, the network would be another one."""
    assert train(*SMALL, "epochs=1", "eval.stats=batch", f"run_dir={tmp_path}") == 0
    subject = open_subject(tmp_path)
    try:
        val = subject.source.val
        with subject.as_evaluated():
            found = subject.evaluate(subject.batches(val, range(len(val))))
        (own,) = subject.evaluator().values()
    finally:
        subject.close()
    assert found.values == own.values and (found.rows["confidence"] == own.rows["confidence"]).all()
