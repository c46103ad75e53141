from torch import nn

from lightning_fscreen.costs.latency import measure_latency


def test_more_work_takes_longer_and_modes_stay():
    small, large = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    large[0].eval()
    fast, slow = measure_latency(small, (8,), (1, 32)), measure_latency(large, (512,), (1, 512))
    assert set(fast) == {1, 32} and all(time > 0 for time in fast.values())
    assert slow[512] > slow[1] and slow[512] > fast[1]
    assert [module.training for module in large.modules()] == [True, False, *[True] * 7]
