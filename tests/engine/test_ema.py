"""The average of weights."""

import torch
from torch import nn

from anorm import create_norm
from anorm.engine.ema import Ema


def test_ema_averages_floats_and_copies_integers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), create_norm("bn", 4))
    ema = Ema(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(30):
        model(torch.randn(8, 3, 5, 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, step / 30)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
            )
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)  # 30 float32 roundings
    assert ema.model[1].num_batches_tracked == 30


def test_ema_obeys_the_limits_of_norms():
    model = nn.Sequential(create_norm("bin", 4))
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model[0].gate.fill_(5.0)
    ema.update(model, 0.5)
    assert ema.model[0].gate.max() <= 1
