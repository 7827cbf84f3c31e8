import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cocoa_embed.demo.pretrain.muon import MuonAndAdamW
from cocoa_embed.demo.pretrain.run import pretrain
from cocoa_embed.demo.pretrain.settings import read_settings
from cocoa_embed.errors import UsageError

MUON_RATE, RATE, DECAY, BETA = 2e-2, 1e-2, 0.1, 0.98


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 8))
        self.words = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.words(self.visual(inputs)).square().mean()


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


INPUTS = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))


def optimizer(model: nn.Module, decay: float = DECAY) -> MuonAndAdamW:
    decayed = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    return MuonAndAdamW(model, decayed, (RATE, MUON_RATE), decay, BETA)


def steps(model: nn.Module, part: torch.optim.Optimizer, count: int = 3) -> list[float]:
    losses = []
    for _ in range(count):
        model.zero_grad()
        loss = model(INPUTS)
        loss.backward()
        losses.append(loss.item())
        part.step()
    return losses


def test_matrices_of_layers_move_alike_in_all_directions_by_their_own_rate(encoder: Encoder) -> None:
    before = copy.deepcopy(encoder)
    steps(encoder, optimizer(encoder, decay=0), count=1)
    moved = encoder.visual[0].weight - before.visual[0].weight
    gradient = encoder.visual[0].weight.grad
    assert gradient is not None
    spread = torch.linalg.svdvals(gradient)[:8]
    assert spread[0] > 3 * spread[-1], "the gradient has directions of different size"
    singular = torch.linalg.svdvals(moved)[:8] / (MUON_RATE * 0.2 * 24**0.5)
    assert (singular > 0.5).all()
    assert (singular < 1.3).all()


def test_everything_else_is_updated_by_adamw_with_its_decay(encoder: Encoder) -> None:
    stock = copy.deepcopy(encoder)
    steps(encoder, optimizer(encoder), count=1)
    decayed = {"params": [stock.words.weight], "weight_decay": DECAY}
    others = [each for name, each in stock.named_parameters() if name.endswith("bias")]
    steps(stock, torch.optim.AdamW([decayed, {"params": others, "weight_decay": 0.0}], lr=RATE, betas=(0.9, BETA)),
          count=1)  # fmt: skip
    for name in ("words.weight", "words.bias", "visual.0.bias", "visual.2.bias"):
        torch.testing.assert_close(encoder.get_parameter(name), stock.get_parameter(name), rtol=0, atol=0)


def test_a_restored_optimizer_continues_like_the_first(encoder: Encoder) -> None:
    first = optimizer(encoder)
    steps(encoder, first)
    state, copied = copy.deepcopy(first.state_dict()), copy.deepcopy(encoder)
    second = optimizer(copied)
    second.load_state_dict(state)
    assert steps(encoder, first) == steps(copied, second)


def test_a_torch_without_muon_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"muon_learning_rate needs torch 2\.9, but this is .*; set it to null"):
        pretrain(read_settings(["all.muon_learning_rate=1e-3"], data="scenes"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
