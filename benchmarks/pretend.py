"""prdp.py on a pretend device, to find where tensors of the CPU and of a GPU would meet.

    python benchmarks/pretend.py --preset demo --num_epochs 1     # any flags of prdp.py

Tensors that are sent to the device "pretend" say that they are there. Their numbers stay in the
CPU's memory and the CPU computes with them. An operation on tensors of both places fails, as it
does with CUDA, but for copies, indices and tensors without dimensions. It computes in float32.
What asks for "cuda" by name, fused AdamW and the default of --precision, is not rehearsed.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prdp  # noqa: E402

_setup_privateuseone_for_python_backend("pretend")
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16]
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
AUTOCAST.fallback(torch.library.fallthrough_kernel)  # autocast changes nothing there
DEVICE = torch.device("pretend", 0)
MAY_MEET = {"copy_", "index", "index_put_", "_index_put_impl_"}


class Pretended(Tensor):
    """A tensor of the device, around one of the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu: Tensor):
        self = Tensor._make_wrapper_subclass(cls, cpu.shape, cpu.stride(), cpu.storage_offset(),
                                             dtype=cpu.dtype, device=DEVICE)
        self.cpu_tensor = cpu
        return self

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), options=None):
        return compute(operator, arguments, options or {})

    def tolist(self):
        return self.cpu_tensor.tolist()

    def untyped_storage(self):
        return self.cpu_tensor.untyped_storage()

    def __reduce_ex__(self, protocol):  # it is saved as one of the CPU
        return self.cpu_tensor.detach().__reduce_ex__(protocol)


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        return compute(operator, arguments, options or {})


def compute(operator, arguments: tuple, options: dict):
    """Run an operator on the CPU; its result is where it would be."""
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
    is_there = [isinstance(tensor, Pretended) for tensor in tensors]
    name = operator._schema.name.removeprefix("aten::")
    if any(is_there) and name not in MAY_MEET and any(
            tensor.dim() and not there for tensor, there in zip(tensors, is_there, strict=True)):
        raise RuntimeError(f"{name}: tensors of the CPU and of the pretend device meet")
    goes_there = is_there[0] if name in MAY_MEET else any(is_there)
    if (device := options.get("device")) is not None:
        goes_there, options = device.type == "pretend", options | {"device": torch.device("cpu")}
    arguments, options = tree_map_only(Pretended, lambda tensor: tensor.cpu_tensor,
                                       (arguments, options))
    result = operator(*arguments, **options)
    for tensor, there in zip(tensors, is_there, strict=True):
        if there and tensor.cpu_tensor is result:
            return tensor  # computed in place
    return tree_map_only(Tensor, Pretended, result) if goes_there else result


if __name__ == "__main__":
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=...) begins on the CPU
    torch.__future__.set_swap_module_params_on_conversion(True)  # a weight that moves stays itself
    prdp.start_distributed = lambda: DEVICE
    with Pretend():
        prdp.main()
