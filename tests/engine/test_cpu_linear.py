"""The compiled matrix product against PyTorch's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharegpt4v.engine import cpu_linear
from sharegpt4v.engine.cpu_linear import Panels, load_linear
from tests.engine.compiling import needs_compiler


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _panels(weight: Tensor, bias: Tensor | None = None) -> Panels:
    function = load_linear()
    if function is None:
        pytest.skip("this processor has no AVX-512")
    return Panels(function, weight, bias)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("width", [1, 7, 16, 767, 769, 2_049])
def test_products_of_any_shape_are_pytorchs(width: int, outputs: int, threads: int) -> None:
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(width * outputs)
    weight, bias = torch.randn(outputs, width, generator=draw), torch.randn(outputs, generator=draw)
    panels, bare = _panels(weight, bias), _panels(weight)
    for rows in (1, 13, 14, 15, 70, 71, 150):
        inputs = torch.randn(rows, width, generator=draw)
        expected = inputs.double() @ weight.double().T
        # Measured: 2.1e-4 at most, of sums whose spread is 45; one after the other, in float32.
        torch.testing.assert_close(bare(inputs).double(), expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(panels(inputs).double(), expected + bias, rtol=0, atol=1e-3)


@needs_compiler
def test_a_row_has_the_same_product_bit_for_bit_in_any_company() -> None:
    panels = _panels(torch.randn(300, 1_000))
    inputs = torch.randn(200, 1_000)
    whole = panels(inputs)
    for rows in ([0], [199], range(3, 90), range(17, 180, 2)):
        assert torch.equal(panels(inputs[list(rows)]), whole[list(rows)])
    torch.set_num_threads(3)
    assert torch.equal(panels(inputs), whole)


@needs_compiler
def test_what_is_no_number_spoils_its_own_row_alone() -> None:
    panels = _panels(torch.randn(40, 64))
    inputs = torch.randn(30, 64)
    inputs[3, 5], inputs[20, 0] = torch.nan, torch.inf
    bad = ~torch.isfinite(panels(inputs)).all(1)
    assert bad.nonzero().flatten().tolist() == [3, 20]


@needs_compiler
def test_rows_that_are_views_and_none_at_all() -> None:
    panels, weight = _panels(torch.ones(40, 8)), torch.ones(40, 8)
    inputs = torch.randn(16, 10).T[1:9].T  # neither its rows nor its columns lie side by side
    torch.testing.assert_close(panels(inputs), inputs @ weight.T)
    assert panels(torch.empty(0, 8)).shape == (0, 40)


@needs_compiler
@pytest.mark.usefixtures("own_cache")
def test_a_product_that_is_something_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _panels(torch.ones(1, 1))
    load_linear.cache_clear()
    source = cpu_linear._SOURCE.read_text()
    assert source.count("k == 0 ? bias") == 1
    wrong = tmp_path / "cpu_linear.cpp"
    wrong.write_text(source.replace("k == 0 ? bias", "k <= DEPTH ? bias"))
    monkeypatch.setattr(cpu_linear, "_SOURCE", wrong)
    assert load_linear() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
