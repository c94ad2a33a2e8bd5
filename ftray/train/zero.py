"""DeepSpeed ZeRO (Rajbhandari et al. 2020): optimizer states (1), gradients (2) and weights (3) are divided among the
workers, and may lie in the host's memory or on NVMe (Ren et al. 2021; Rajbhandari et al. 2021).

Trained weights, their gradients and what is exchanged of them are fp32, and `precision: bf16` is autocast, all as
without ZeRO, so that losses are those of `DataParallel` (measured over 30 steps: within 0.13 %, against 0.28 % with
DeepSpeed's bf16 weights, whose norms near 1 do not see updates below 0.4 %). Commits are by parameter name: another
stage, offload or number of workers goes on from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftray.config import Run
from ftray.model.load import elements, evaluating, shape
from ftray.model.methods import check_same
from ftray.model.states import NVME_GROUP
from ftray.train.batch import Batch, collate
from ftray.train.commits import Commit, Lazy, State
from ftray.train.native import compile_parts, parts
from ftray.train.optimizers import build_optimizer, set_rate
from ftray.train.strategy import autocast
from ftray.train.world import World

_PERSISTENT = 10_000
"""ZeRO 3: parameters with fewer elements (norms, biases) stay whole on every worker."""


def prepare(run: Run, world: World) -> Any:
    """DeepSpeed, quiet, on the process group that torch has; without one, on a group of this process alone."""
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", r"`torch.distributed.*is deprecated", FutureWarning)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with _quiet():
        import deepspeed

        if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":  # as `ftray.session` sets it unless --verbose
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        compile_parts(parts(run))
        # its own shared-memory exchange on CPUs would be compiled too, and is not torch's
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def configuration(run: Run, world: World, largest: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration of `run`, every number given. `largest`: elements of the model's largest parameter;
    `trained`: elements that are trained."""
    strategy, train = run.strategy, run.train
    assert strategy is not None
    bucket = 2 * max(1, min(strategy.bucket_elements, trained) // 2)  # DeepSpeed wants it even
    zero: dict[str, Any] = {
        "stage": strategy.zero,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": world.device.type == "cuda",
        "contiguous_gradients": True,
        "memory_efficient_linear": False,
        "sub_group_size": NVME_GROUP if strategy.offload_optimizer == "nvme" else 1_000_000_000,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": strategy.keep_elements,
        "stage3_max_reuse_distance": strategy.keep_elements,
        "stage3_param_persistence_threshold": _PERSISTENT,
    }
    pinned = {"pin_memory": strategy.pin_memory and world.device.type == "cuda"}
    if strategy.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": strategy.offload_optimizer, **pinned} | _nvme(
            run, strategy.offload_optimizer
        )
    if strategy.offload_parameters != "none":
        zero["offload_param"] = {"device": strategy.offload_parameters, **pinned} | _nvme(
            run, strategy.offload_parameters
        )
        if strategy.offload_parameters == "nvme":
            zero["offload_param"] |= {"buffer_count": 5, "buffer_size": -(-largest // world.size) + 4096}
    return {
        "train_batch_size": world.size,  # ftray lays out its micro-batches itself
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.clip_norm or 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _nvme(run: Run, device: str) -> dict[str, Any]:
    return {"nvme_path": nvme_folder(run)} if device == "nvme" else {}


def nvme_folder(run: Run) -> str:
    """The run's own folder below `strategy.nvme_path`."""
    assert run.strategy is not None
    assert run.strategy.nvme_path is not None
    own = hashlib.sha256(os.path.abspath(run.folder).encode()).hexdigest()[:12]
    return os.path.join(os.path.abspath(run.strategy.nvme_path), f"ftray-{run.name}-{own}")


_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
"""Where DeepSpeed's three optimizers keep their fp32 masters."""


class Zero:
    """One engine of DeepSpeed around model and loss."""

    def __init__(self, run: Run, model: nn.Module, objective: nn.Module, world: World) -> None:
        assert run.strategy is not None
        self.run, self.model, self.objective, self.world = run, model, objective, world
        self.stage = run.strategy.zero
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        deepspeed = prepare(run, world)
        self.computing = _Computing(run, objective, world)
        if self.stage == 3:
            for parameter in model.get_output_embeddings().parameters():  # type: ignore[operator]
                deepspeed.zero.register_external_parameter(objective, parameter)  # gathered once, see TargetLoss
        sizes = [elements(p) for p in model.parameters()]
        config = configuration(run, world, max(sizes), sum(map(elements, self.trained.values())))
        with _quiet():
            self.engine, *_ = deepspeed.initialize(
                model=self.computing,
                optimizer=_optimizer(run, model),
                config=config,
                dist_init_required=False,
            )
        self._empty_step()
        self._set_steps(0)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer that divides."""
        return self.engine.optimizer

    @property
    def _basic(self) -> torch.optim.Optimizer:
        """The optimizer within, over this worker's flat parts."""
        return self._zero.optimizer

    def _empty_step(self) -> None:
        """A step at rate 0 without a gradient: it makes the optimizer's states, all zero, and carries the masters over
        into the weights."""
        method = self.run.method
        filler = collate([], 0, packed=True, virtual_tokens=method.virtual_tokens, prefix_tokens=method.prefix_tokens)
        self.gradients([filler.to(self.world.device)], 1.0, [0])
        self.update(0.0, apply=True)
        if self.stage < 3:  # DeepSpeed links parameters to their states after the first group's step: too early
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def gradients(self, batches: list[Batch], divisor: float, seeds: list[int]) -> list[Tensor]:
        share, losses = self.world.size / divisor, []  # DeepSpeed divides by the number of workers
        for batch, seed in zip(batches, seeds, strict=True):
            self.world.mark("a micro-batch")
            torch.manual_seed(seed)
            loss = self.engine(batch)
            self.engine.backward(loss * share)
            losses.append(loss.detach())
        self._last = max(batches, key=lambda batch: len(batch.labels))
        return losses

    def update(self, rate: float, apply: bool) -> float:
        if not apply:  # a gradient that is not a number makes DeepSpeed leave the step out
            self.engine.backward(self.engine(self._last) * math.nan)
        set_rate(self._basic, rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.inf

    def loss(self, batches: Iterable[Batch]) -> float:
        with evaluating(self.objective):
            return sum(float(self.computing(batch)) for batch in batches)

    # -------------------------------------------------------------------------------------------------------- commits

    def state(self) -> State:
        """Gathered a tensor at a time, by all workers in the same order."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def state_of(path: str) -> Tensor:
            name, key = path.split("/")
            if key == "step":
                return torch.tensor(float(self._steps()))
            return safe_get_full_optimizer_state(self.trained[name], key).cpu()

        def master_of(name: str) -> Tensor:
            return safe_get_full_fp32_param(self.trained[name]).cpu()

        paths = [f"{name}/{key}" for name in self.trained for key in (*self._keys(), "step")]
        return State(Lazy(self.trained, master_of), Lazy(paths, state_of))

    def load(self, commit: Commit) -> None:
        """Each worker takes its part. A step at rate 0 carries the masters over into the weights that compute; then
        come the optimizer's states."""
        saved, states = commit.state.model, commit.state.optimizer
        check_same(saved, {name: shape(p) for name, p in self.trained.items()})
        for name in self.trained:
            self._put(name, saved[name], None)
        self._empty_step()
        for name in self.trained:
            for key in self._keys():
                self._put(name, states[f"{name}/{key}"], key)
        self._set_steps(max((int(states[f"{name}/step"]) for name in self.trained), default=0))

    def _put(self, name: str, whole: Tensor, key: str | None) -> None:
        """This worker's part of `whole` into the master (`key` None) or the optimizer's state."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter: Any = self.trained[name]
        if self.stage == 3:
            flat, each = whole.flatten(), parameter.ds_tensor.ds_numel
            mine = nn.functional.pad(flat, (0, each * self.world.size - len(flat)))
            mine = mine.narrow(0, each * self.world.rank, each)
            if key is None:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, key)

    def _keys(self) -> list[str]:
        """Names of the tensors that the optimizer keeps for each parameter."""
        first: dict[str, Any] = next(iter(self._basic.state.values()), {})
        return [key for key, value in first.items() if isinstance(value, Tensor) and key != "step"]

    def _steps(self) -> int:
        return max((int(state["step"]) for state in self._basic.state.values() if "step" in state), default=0)

    def _set_steps(self, steps: int) -> None:
        for state in self._basic.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(steps)
            elif "step" in state:
                state["step"] = steps

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed import zero

        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                with zero.GatheredParameters([parameter]) if self.stage == 3 else contextlib.nullcontext():
                    yield name, parameter.detach()

    # --------------------------------------------------------------------------------------------------------- memory

    def held(self) -> dict[str, int]:
        """Bytes of this worker's tensors now, each storage once, by what they are for."""
        found: dict[int, int] = {}

        def take(tensors: Iterable[Any]) -> int:
            new = {storage.data_ptr(): storage.nbytes() for t in tensors if (storage := t.untyped_storage()).nbytes()}
            new = {where: size for where, size in new.items() if where not in found}
            found.update(new)
            return sum(new.values())

        zero, basic = self._zero, self._basic
        parameters = list(self.model.parameters())
        weights = [getattr(p, "ds_tensor", p.data) for p in parameters] + [p.data for p in parameters]
        masters = [t for name in _MASTERS for t in getattr(zero, name, [])]
        sizes = {
            "weights": take([*weights, *_tensors(vars(zero).get("bit16_groups_flat", []))]),
            "masters": take(masters),
            "states": take(_tensors(list(basic.state.values()))),
            "gradients": take([t.grad for t in [*parameters, *masters] if t.grad is not None])
            + take(_tensors([value for name, value in vars(zero).items() if "grad" in name])),
            "buffers": take(_tensors(vars(zero))),
        }
        return sizes | {"nvme": _nvme_bytes(self.run, self.world)}

    def close(self) -> None:
        """Remove what lies on NVMe, and what PEFT was told of ZeRO 3."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        if self.run.strategy and self.run.strategy.nvme_path:
            self.world.barrier()
            shutil.rmtree(nvme_folder(self.run), ignore_errors=True)


class _Computing(nn.Module):
    """The objective in the run's precision. DeepSpeed turns off what is set around its engine, so it is set within."""

    def __init__(self, run: Run, objective: nn.Module, world: World) -> None:
        super().__init__()
        assert run.strategy is not None
        self.objective, self.precision, self.world = objective, run.train.precision, world
        self.whole = run.strategy.zero < 3  # else no worker may gather copies of all weights

    def forward(self, batch: Batch) -> Tensor:
        with autocast(self.precision, self.world, keep_copies=self.whole):
            return self.objective(batch)


def _optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    assert run.strategy is not None
    optimizer = build_optimizer(model, run.train)
    if run.strategy.offload_optimizer == "none":
        return optimizer
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class CPUAdam(DeepSpeedCPUAdam):
        """Its bias correction multiplies on from step to step, unless the step is not the next one: then it is computed
        from the step alone, so that a resumed run is bit for bit the unbroken one. A far step of a tensor of its own
        comes before each."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            group, dummy = self.param_groups[0], [torch.ones(1) for _ in range(4)]
            far = 1_000_000_000 + 2 * next((s["step"] for s in self.state.values()), 0)
            self.ds_opt_adam.adam_update(self.opt_id, far, 0.0, *group["betas"], 1.0, 0.0, True, *dummy)
            return super().step(closure)

    return CPUAdam(optimizer.param_groups, lr=run.train.learning_rate, betas=run.train.betas, eps=run.train.epsilon)


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Tensors in containers and in DeepSpeed's own objects."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            value = list(value.values())
        elif type(value).__module__.startswith("deepspeed.runtime") and not isinstance(value, nn.Module):
            value = list(getattr(value, "__dict__", {}).values())
        if isinstance(value, list | tuple | set):
            for item in value:
                yield from _tensors(item, seen)


def _nvme_bytes(run: Run, world: World) -> int:
    if run.strategy is None or run.strategy.nvme_path is None:
        return 0
    return sum(path.stat().st_size for path in Path(nvme_folder(run)).glob(f"**/rank{world.rank}/*"))
