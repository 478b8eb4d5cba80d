"""What several test files share."""

import pytest
import torch

from lab import questions


@pytest.fixture(scope="module")
def one_thread():
    """Products this small only wait for a second thread, for long if the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> questions.Tokenizer:
    return questions.microworld_tokenizer()
