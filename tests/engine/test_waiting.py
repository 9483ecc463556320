"""Between two reports nothing asks the device for a value. Tensors of the meta device have none: asking is an error."""

import pytest
import torch
from commands import ROOT, SMALL

from anorm.build import build
from anorm.config.frozen import Config
from anorm.engine.fit import train_epoch
from anorm.engine.meter import Clock, Meter, SaveTimer
from anorm.processes.world import Agreement, World


@pytest.mark.parametrize("norm", ["an", "bin", "ssn"])
def test_an_epoch_waits_for_the_device_at_its_reports_alone(tmp_path, monkeypatch, norm):
    asked = [
        *SMALL,
        f"norm={norm}",
        "optim.impl=foreach",  # torch's fused kernels know no meta device
        "optim.clip=1.0",
        "mix.mixup=0.2",
        "mix.cutmix=1.0",
        "ema.decay=0.9",
        "log.every=2",
    ]
    config = Config.compose(ROOT / "configs", asked).on()
    world = World(device=torch.device("meta"))
    run = build(config, tmp_path, "signature", world, None)
    reported = []
    monkeypatch.setattr(Meter, "report", lambda meter, epoch, rate: reported.append(meter.run.progress.step))
    monkeypatch.setattr(Meter, "epoch_mean", lambda meter: 1.0)  # of what reports have read
    agreement = Agreement(world)
    try:
        train_epoch(run, 0, 0, agreement, SaveTimer(run.settings), Clock(run.progress))
    finally:
        agreement.close()
        run.close()
    assert reported == [2, 4] and run.sums.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        run.sums.tolist()
