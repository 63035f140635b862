"""The pretended device refuses what a GPU refuses, counts waits, and carries gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretended_device import DEVICE, DeviceTensor, PretendedDevice


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with PretendedDevice() as pretended:
        yield pretended


def test_it_refuses_what_cuda_refuses(device: PretendedDevice) -> None:
    there = torch.ones(3, device="cuda")
    assert isinstance(there, DeviceTensor) and there.device == DEVICE
    for wrong in (
        lambda: there + torch.ones(3),
        lambda: torch.ones(3)[there.long()],
        lambda: there.gather(0, torch.zeros(1, dtype=torch.long)),
        lambda: torch.multinomial(there, 1, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="device"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there + torch.tensor(1.0))[torch.tensor([0])].cpu().tolist() == [2.0]
    assert torch.multinomial(there, 1, generator=torch.Generator(device="cuda")).device == DEVICE


def test_it_counts_waits(device: PretendedDevice) -> None:
    there = torch.ones(3, device="cuda")
    for wait in (
        there.sum().item,
        there.cpu,
        there.nonzero,
        there.tolist,
        lambda: there[there > 0],
        lambda: bool(there[0]),
    ):
        device.waits.clear()
        wait()
        assert len(device.waits) == 1
    device.waits.clear()
    there[torch.tensor([0])] = 5
    there.to("cuda").mul_(2).sum()
    assert device.waits == []


def test_gradients_cross_devices(device: PretendedDevice) -> None:
    here = torch.ones(3, requires_grad=True)
    (here.to("cuda") * 2).cpu().sum().backward()
    assert type(here.grad) is torch.Tensor and here.grad.tolist() == [2.0] * 3
