"""One captioner with random weights for all tests of the torch engine."""

import pytest
import torch

from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from tests.models.random_weights import save_random_captioner


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    torch.set_num_threads(1)
    return load_adapter(save_random_captioner(tmp_path_factory.mktemp("captioner")))
