import torch
from torch import nn

from lightning_fscreen.costs.latency import compare_latency, measure_latency


def test_more_work_takes_longer_and_modes_stay():
    small, large = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    large[0].eval()
    fast, slow = (
        measure_latency(net, (torch.zeros(2, net[0].in_features),), batch_sizes=sizes)
        for net, sizes in ((small, (1, 32)), (large, (1, 512)))
    )
    assert set(fast) == {1, 32} and all(time > 0 for time in fast.values())
    assert slow[512] > slow[1] and slow[512] > fast[1]
    assert [module.training for module in large.modules()] == [True, False, *[True] * 7]


def test_networks_are_compared_on_the_same_inputs():
    small, large = nn.Linear(512, 8), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    fast, slow = compare_latency([small, large], (torch.zeros(2, 512),), None, 64)
    assert 0 < fast < slow and small.training and large.training


def test_inputs_are_repeated_to_the_batch_and_given_by_name_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)

        def forward(self, ids, *, scale, mask):
            seen.append((ids.shape, scale.shape, mask.shape, ids.dtype))
            return self.words(ids) * scale * mask[..., None]

    seen = []
    ids = torch.randint(9, (2, 3))
    assert measure_latency(Scaled(), (ids,), {"scale": torch.ones(4), "mask": ids > 2}, (1, 5)).keys() == {1, 5}
    assert set(seen) == {((count, 3), (4,), (count, 3), torch.int64) for count in (1, 5)}
