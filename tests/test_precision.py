import pytest
import torch

from lightning_fscreen.functional.precision import exact_products, without_tf32

BACKENDS = torch.backends


@pytest.fixture(params=["newer", "older"])
def precision(request, monkeypatch):
    """float32 products that may be rounded, and the switches that say so: torch's newer ones, or those before 2.9."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if hasattr(BACKENDS.cudnn, "conv"):
        switches = [BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
    elif request.param == "newer":
        pytest.skip("torch has the older switches only")
    if request.param == "older":
        monkeypatch.delattr(type(BACKENDS.cudnn), "conv", raising=False)
        assert not hasattr(BACKENDS.cudnn, "conv")
        yield lambda: [torch.get_float32_matmul_precision() == "highest", not BACKENDS.cudnn.allow_tf32]
    else:
        yield lambda: [switch.fp32_precision == "ieee" for switch in switches]
    monkeypatch.undo()
    torch.set_float32_matmul_precision(was)


@pytest.mark.filterwarnings("error")
def test_products_have_all_digits(precision):
    a, b = torch.randn(2, 512, 512)
    torch.set_float32_matmul_precision("highest")
    exact = a @ b
    torch.set_float32_matmul_precision("medium")
    rounded, before = a @ b, precision()  # some CPUs round, too
    with pytest.raises(ZeroDivisionError), without_tf32():
        assert all(precision()) and torch.equal(a @ b, exact)
        raise ZeroDivisionError
    with torch.autocast("cpu", torch.bfloat16):
        with exact_products("cpu"):
            assert torch.equal(a @ b, exact) and precision()[0] and not precision()[-1]
        assert (a @ b).dtype == torch.bfloat16
    assert precision() == before != [True] * len(before) and torch.equal(a @ b, rounded)


def test_what_rounds_nothing_follows_the_switch_for_all_operators():
    if not hasattr(BACKENDS.cudnn, "conv"):
        pytest.skip("torch has no such switch")
    for switch in (was := [BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul]):
        switch.fp32_precision = "none"
    with exact_products("cpu"):
        pass
    try:
        BACKENDS.fp32_precision = "tf32"
        assert [switch.fp32_precision for switch in was] == ["tf32", "tf32"]
    finally:
        BACKENDS.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
