"""vLLM as a side of benchmarks/engine.py, run by the interpreter of an environment that has it.

    .venv-vllm/bin/python benchmarks/engine_vllm.py < QUESTION

QUESTION is JSON: model (a folder), slots, threads, eager, and prompts and lengths, a list of token ids and a
number of tokens each. The last line printed is the seconds from the first request to the end of the last.
Imports nothing of ours, so that it runs in an environment without our packages.
"""

import json
import os
import sys
import time
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its core runs in this process, as our engine does
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB, more than any of the benchmark's lines needs
}


def run(question: dict[str, Any]) -> float:
    """Returns the seconds of all requests; loading, compiling and a first small batch come before."""
    # Read when OpenMP is loaded; vLLM's own binding of threads is for workers in processes of their own.
    os.environ.update(SETTINGS, OMP_NUM_THREADS=str(question["threads"]))
    from vllm import LLM, SamplingParams

    prompts, lengths = question["prompts"], question["lengths"]
    llm = LLM(
        question["model"],
        dtype="float32",
        max_num_seqs=question["slots"],
        max_model_len=max(len(ids) + n for ids, n in zip(prompts, lengths, strict=True)) + 1,
        enforce_eager=question["eager"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # no two prompts are alike
    )
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    few = min(len(inputs), question["slots"])
    short = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    llm.generate(inputs[:few], [short] * few, use_tqdm=False)
    start = time.perf_counter()
    answers = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    wanted = [len(answer.outputs[0].token_ids) for answer in answers]
    if wanted != lengths:
        sys.exit("vLLM's answers do not have the lengths that were asked for")
    return seconds


if __name__ == "__main__":
    print(run(json.load(sys.stdin)))
