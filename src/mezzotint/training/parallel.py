"""A loss on several processes, by torch's engines: DDP, or sharded by ``fully_shard``."""

import contextlib
import inspect
from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mezzotint.errors import ConfigError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.training.ema import whole
from mezzotint.training.ranks import Ranks

__all__ = ["Parallel", "gather_into", "laid_out", "load_whole", "shard"]

_OLD_NAME = "broadcast_buffers"  # until torch 2.12


class Parallel:
    """Calls a module whose gradients are then the means over the ranks.

    Args:
        module: Computes a loss of this rank's samples.
        ranks: This process among the others; alone, the module is called as it is.
        replicated: Whether every rank has all weights. What `shard` split takes care of itself.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, *, replicated: bool = True) -> None:
        self._module = module
        self._replica: DistributedDataParallel | None = None
        if ranks.several and replicated and any(p.requires_grad for p in module.parameters()):
            # buffers are constants, or counts of each rank's own
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else _OLD_NAME
            options: dict[str, Any] = {name: False}
            self._replica = DistributedDataParallel(module, **options)

    def __call__(self, *inputs: Any) -> Any:
        """Call the module."""
        return (self._replica or self._module)(*inputs)

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Generator[None]:
        """Gradients of parts of a step are added up; those of the last are sent to the others."""
        if self._replica is None or last:
            yield
        else:
            with self._replica.no_sync():
                yield


def shard(model: LatentDiffusion) -> None:
    """Split the trained weights of a model over the ranks, level by level of the UNet.

    Args:
        model: On its device; the first stage stays whole.

    Raises:
        ConfigError: If torch is too old to write what is sharded as safetensors.
    """
    if not hasattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter"):
        raise ConfigError(f"run.sharding: needs torch 2.8 or newer, this is {torch.__version__}")
    unet, conditioner = model.unet, model.conditioner
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block)
    fully_shard(unet)
    if any(True for _ in conditioner.parameters()):
        fully_shard(conditioner)
        register_fsdp_forward_method(conditioner, "null")


@torch.no_grad()
def gather_into(plain: nn.Module | None, module: nn.Module) -> None:
    """Gather the state of a sharded module, tensor by tensor; all ranks must call this.

    Args:
        plain: Takes it, in the first rank; elsewhere there is None.
        module: Of the same parameters, sharded.
    """
    places = {} if plain is None else plain.state_dict()
    for name, tensor in module.state_dict().items():
        gathered = whole(tensor)
        if plain is not None:
            places[name].copy_(gathered)


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor as it is, or this rank's share of it if ``like`` is sharded.

    A share stays as it is.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may be sharded."""
    mine = module.state_dict()
    module.load_state_dict(
        {k: laid_out(t, mine[k]) if k in mine else t for k, t in tensors.items()}
    )
