"""A network on its device: compiled, and distributed over processes."""

from contextlib import nullcontext

import pytest
import torch

from anorm import create_model
from anorm.config.settings import settings_from
from anorm.engine.device import compiled, distributed


def test_each_process_keeps_its_own_statistics_under_ddp():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network = distributed(create_model("convnet", "bn", 4), torch.device("cpu"))
        overwriting = (
            "forward_sync_buffers" if hasattr(network, "forward_sync_buffers") else "broadcast_buffers"
        )
        assert getattr(network, overwriting) is False
    finally:
        torch.distributed.destroy_process_group()


def test_compiling_that_changes_a_network_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: lambda images: 1.001 * model(images))
    model = create_model("convnet", "bn", 4)
    with pytest.raises(ValueError, match=r"changes this network's outputs by 0\.1 %"):
        compiled(model, (torch.randn(2, 3, 32, 32),), torch.device("cpu"), nullcontext, settings_from({}).hardware)


def test_compiling_is_refused_where_the_answer_is_no_tensor():
    class Two(torch.nn.Module):
        def forward(self, images):
            return [images, images]

    with pytest.raises(ValueError, match="one tensor"):
        compiled(Two(), (torch.randn(2, 3, 8, 8),), torch.device("cpu"), nullcontext, settings_from({}).hardware)
