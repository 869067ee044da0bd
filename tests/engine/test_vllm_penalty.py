"""The penalty that vLLM is given is the torch engine's, while requests come, go and change places."""

import torch

from sharegpt4v.dialogue import SamplingParams
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.vllm_penalty import Penalised, Penalties

CPU = torch.device("cpu")


def _logits(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))


def test_the_penalty_is_the_torch_engines() -> None:
    strengths = (1.7, 1.0, 0.6)
    sampler, penalties = TokenSampler(3, 40, [39], CPU), Penalties(3, CPU)
    for slot, strength in enumerate(strengths):
        sampler.admit(slot, SamplingParams(repetition_penalty=strength), 0)
    rows = {row: Penalised(strength, []) for row, strength in enumerate(strengths) if strength != 1}
    logits = _logits(3)  # the same at every step: only the penalty makes the next token another one
    chosen = []
    for _ in range(6):
        tokens = sampler.choose(logits.clone(), [0, 1, 2])[0].tolist()
        ours = penalties.apply(logits.clone(), rows).argmax(-1).tolist()
        assert ours == tokens
        chosen.append(tokens)
        for row, entry in rows.items():
            entry.generated.append(tokens[row])
    assert len({tokens[0] for tokens in chosen}) > 1 == len({tokens[1] for tokens in chosen})


def test_marks_follow_a_request_that_moves_and_a_newcomer_has_none() -> None:
    penalties, logits = Penalties(2, CPU), _logits(2)
    first, second = Penalised(2.0, [3, 4]), Penalised(2.0, [5])
    penalties.apply(logits.clone(), {0: first, 1: second})
    second.generated.append(6)
    newcomer = Penalised(2.0, [])  # `first` is gone, and vLLM moved `second` into its row
    after = penalties.apply(logits.clone(), {0: second, 1: newcomer})
    assert (after != logits).nonzero().tolist() == [[0, 5], [0, 6]]


def test_notes_outgrow_their_first_room() -> None:
    penalties, logits = Penalties(2, CPU), torch.ones(2, 2000)
    long, short = Penalised(2.0, []), Penalised(2.0, [1999])
    for length in (60, 64, 65, 900):
        long.generated.extend(range(len(long.generated), length))
        after = penalties.apply(logits.clone(), {0: long, 1: short})
        assert after[0].eq(0.5).nonzero()[:, 0].tolist() == list(range(length))
        assert after[1].eq(0.5).nonzero()[:, 0].tolist() == [1999]


def test_a_request_that_vllm_begins_again_is_read_from_the_start() -> None:
    penalties, logits = Penalties(1, CPU), _logits(1)
    penalties.apply(logits.clone(), {0: Penalised(2.0, [7])})
    after = penalties.apply(logits.clone(), {0: Penalised(2.0, [1, 2])})
    assert (after != logits).nonzero()[:, 1].tolist() == [1, 2]
