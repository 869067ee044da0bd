"""DeepSpeed's ZeRO-2 and ZeRO-3 as a backend of the training loop, also on a machine without a compiler."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharegpt4v.errors import UserError
from sharegpt4v.train.backend import ParameterState, Workers
from sharegpt4v.train.collate import PackedRow
from sharegpt4v.train.optimizer import OptimizerSettings, make_optimizers
from sharegpt4v.train.packed_model import PackedModel

_KEPT = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, beside the count of its steps."""


def deepspeed_config(
    stage: Literal[2, 3], settings: OptimizerSettings, *, workers: int, half: bool, offload: bool, gpu: bool
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration. half: bfloat16 weights with float32 ones in the optimizer.

    Micro-steps are ours, as their number changes from step to step: accumulation is 1 here, and the loop
    says which backward pass is the last of a step.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": gpu,
        "contiguous_gradients": True,
        # Each worker reads these from any checkpoint by name, so the layout may be DeepSpeed's own.
        "reduce_scatter": True,
    }
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": False, "stage3_max_live_parameters": 10**9}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": workers,
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its build takes a minute and a compiler
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed(gpu: bool) -> Any:
    """Imports DeepSpeed so that it builds nothing: on CPU its own communication would take four minutes."""
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedBackend:
    """ZeRO-2 or ZeRO-3 over the process group that exists. offload: optimizer states in main memory.

    Raises UserError for Muon, whose update needs whole matrices that ZeRO divides.
    """

    def __init__(
        self,
        model: PackedModel,
        settings: OptimizerSettings,
        stage: Literal[2, 3],
        *,
        offload: bool = False,
        hang_seconds: float = 1800.0,
    ) -> None:
        if settings.kind == "muon":
            raise UserError(
                "muon is refused: ZeRO divides the matrices it needs; use adamw", field="optimizer"
            )
        self.device = model.adapter.device
        gpu = self.device.type == "cuda"
        self._deepspeed = _import_deepspeed(gpu)
        if not dist.is_initialized():  # DeepSpeed needs a group, if only of this process
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("nccl" if gpu else "gloo", store=alone, rank=0, world_size=1)
        # Where no launcher of its own sets it, DeepSpeed asks for the number of the worker on its node.
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        self._deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
        self._group = Workers(hang_seconds)
        self.worker, self.workers = self._group.worker, self._group.workers
        self.total, self.meet, self.gather = self._group.total, self._group.meet, self._group.gather
        self._model, self._stage = model, stage
        [optimizer] = make_optimizers(model.model, settings)
        half = model.adapter.dtype == torch.bfloat16
        config = deepspeed_config(stage, settings, workers=self.workers, half=half, offload=offload, gpu=gpu)
        self._engine, self._zero, _, _ = self._deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        if stage == 3:
            self._name_outer_parameters()
        self._trained = [(n, p) for n, p in model.model.named_parameters() if p.requires_grad]

    def loss(self, row: PackedRow) -> Tensor:
        loss: Tensor = self._engine(row)
        return loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the workers; the loss is a share of the global batch's, to be summed.
        self._engine.backward(loss * self.workers)
        if not last:
            self._engine.step()  # counts the micro-step, and changes nothing

    def gradient_norm(self) -> float:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self._stage == 2:
            return float(self._zero.scaled_global_norm())
        return float(combine_grad_norm_groups(self._zero._get_norm_groups()))

    def update(self, share: float, norm: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = group["peak"] * share
        self._engine.step()
        assert self._engine.was_step_applied(), f"DeepSpeed dropped a step whose gradient norm is {norm}"

    def discard(self) -> None:
        """Lets DeepSpeed drop the step as one whose gradients overflow: then it clears all of its buffers."""
        name = "scaled_global_norm" if self._stage == 2 else "_get_norm_groups"
        infinite = torch.tensor(math.inf)
        setattr(self._zero, name, lambda: infinite if self._stage == 2 else [infinite])
        try:
            self._engine.step()
        finally:
            delattr(self._zero, name)  # the class's own is seen again
        assert not self._engine.was_step_applied()
        self._gather_small()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers all parameters under ZeRO-3: a device then holds the whole model beside its share."""
        if self._stage == 2:
            yield
            return
        with self._deepspeed.zero.unwrap_model_for_generation(self._engine):
            yield
        self._gather_small()

    def _gather_small(self) -> None:
        """Gathers the small parameters that ZeRO-3 keeps whole, as it does itself after a step.

        A dropped step leaves them divided; what uses one outside of its module would find it empty.
        """
        if self._stage == 3:
            self._zero.checkpoint_event_epilogue()

    def state(self) -> Iterator[tuple[str, ParameterState]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        steps = next((s["step"] for s in self._zero.optimizer.state.values() if "step" in s), None)
        if steps is None:  # every step so far was skipped
            self._begin_states(torch.zeros(()))
        self._link_states()
        for name, parameter in self._trained:
            kept = {key: safe_get_full_optimizer_state(parameter, key) for key in _KEPT}
            value = safe_get_full_fp32_param(parameter)
            yield name, {"value": value, "step": torch.tensor(float(steps or 0)), **kept}

    def restore(self, state: Mapping[str, ParameterState]) -> None:
        self._begin_states(next(iter(state.values())).get("step", torch.zeros(())))
        self._link_states()
        with torch.no_grad():
            for name, parameter in self._trained:
                for key, tensor in state[name].items():
                    if key != "step":
                        self._set(parameter, tensor, None if key == "value" else key)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.model.named_parameters():
            if self._stage == 3:
                with self._deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach().clone()
            else:
                yield name, parameter.detach()

    def _begin_states(self, steps: Tensor) -> None:
        """Gives the inner optimizer a state of zeros after so many steps, ()."""
        for flat in self._flat_parameters():
            zeros = {key: torch.zeros_like(flat.data) for key in _KEPT}
            self._zero.optimizer.state[flat] = {"step": steps.clone().float(), **zeros}

    def _link_states(self) -> None:
        """Lets parameters find their optimizer state in the flat one.

        ZeRO-2 does so once, after the step of its first group, when the other groups have no state yet.
        """
        if self._stage == 2:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat_parameters(self) -> Sequence[Tensor]:
        """Returns what the inner optimizer sees: this worker's share, flat, float32."""
        name = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        flat: Sequence[Tensor] = getattr(self._zero, name)
        return flat

    def _set(self, parameter: nn.Parameter, tensor: Tensor, key: str | None) -> None:
        """Sets a parameter's float32 value (key None) or what the optimizer keeps of it.

        The values that the network computes with are set before DeepSpeed begins (see `worker`).
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage == 2:
            if key is None:
                safe_set_full_fp32_param(parameter, tensor)
            else:
                safe_set_full_optimizer_state(parameter, tensor, key)
            return
        # The last worker's share may be padded, which DeepSpeed's function for whole tensors overruns.
        share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = nn.functional.pad(tensor.flatten(), (0, share * self.workers - tensor.numel()))
        own = flat[share * self.worker : share * (self.worker + 1)].to(parameter.device)
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)

    def _name_outer_parameters(self) -> None:
        """Registers parameters that are used outside of the module that holds them, to be gathered."""
        for module in self._model.modules():
            if isinstance(module, nn.MultiheadAttention):  # it multiplies by its projection's weight itself
                for parameter in module.out_proj.parameters():
                    self._deepspeed.zero.register_external_parameter(module, parameter)
        for name in ("query_tokens", "start_embedding", "end_embedding"):
            if hasattr(self._model.model, name):
                outer = getattr(self._model.model, name)
                self._deepspeed.zero.register_external_parameter(self._model, outer)
