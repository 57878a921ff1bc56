"""Loads a packed folder as a transformers model whose Linears multiply from packed weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import (
    forget_quantization_,
    initialise_,
    is_computed,
    is_left_out,
    take_generation_config_,
    tie_weights_,
)
from ace_ext.models.loading import LoadedModel, check_causal, check_fit, load_model, load_tokenizer
from ace_ext.models.safetensors_files import Shards, all_names
from ace_ext.models.skeleton import check_all_read, not_stored, skeleton
from ace_ext.packed.compressed_tensors import CompressedShards, is_compressed
from ace_ext.packed.files import PackedShards, is_packed
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.packing import check_hashes
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.runtime.embedding import can_pack, pack_embedding_
from ace_ext.runtime.linear import PackedLinear, linear_of


def load_packed(folder: str | Path, verify: bool = False) -> nn.Module:
    """Loads a folder that ``ace-prune pack`` wrote as a model on the CPU, in evaluation mode.

    The weights of its Linears stay packed (:class:`PackedLinear`; of a quantized model
    :class:`ace_ext.runtime.QuantizedLinear`). Those of a ``bitmap`` folder are mapped from the file; those of ``nm``
    and ``archive`` are converted in memory to the layout that kernels read. Everything else is as loaded by
    ``from_pretrained`` with ``dtype="auto"``. Experts that transformers fuses into one tensor are unpacked.

    Args:
        folder: a folder that ``ace-prune pack`` or ``ace-prune run --format`` wrote.
        verify: compare every weight with the SHA-256 of the dense files before loading. This reads and unpacks all
            weights once. Without it sizes, counts and bitmaps are checked, but not the values: a changed value of a
            ``bitmap`` or ``nm`` folder goes unnoticed (``archive`` has checksums of its own). ``ace-prune verify``
            makes the same comparison.

    Raises:
        InputError: the folder is not packed, damaged, or transformers cannot build its model; with ``verify`` also if
            it does not restore the files that were packed.
    """
    if verify:
        check_hashes(PackedShards(folder, mapped=False))
    model = build_packed(folder)
    take_generation_config_(model, str(Path(folder).expanduser()))
    return model


def build_packed(folder: str | Path, empty: Callable[[], nn.Module] | None = None) -> nn.Module:
    """:func:`load_packed` without the settings of generation.

    Args:
        folder: a folder that ``ace-prune pack`` wrote.
        empty: makes the model with parameters on the meta device, in their final dtypes; by default from the folder's
            configuration. Weights of another dtype are converted, and then not mapped.

    Raises:
        InputError: as :func:`load_packed`.
    """
    shards = PackedShards(folder)
    if empty is None:
        model = skeleton(shards.folder, shards, causal=False)
        check_all_read(model, shards, str(folder))
    else:
        model = empty()
        _check_loaded(model, shards.adopt(model))
    names, matrices = all_names(model), _matrices(model, shards)
    made: dict[tuple[int, int], PackedLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.Linear) and id(module.weight) in matrices:
            key = id(module.weight), id(module.bias)
            if key not in made:
                bias: Tensor | None = module.bias
                if bias is not None:
                    bias = _read(shards.stored_name(names[id(bias)]) or f"{name}.bias", bias, shards)
                made[key] = linear_of(matrices[id(module.weight)], bias)
            _replace(model, name, made[key])
        elif can_pack(module) and id(module.weight) in matrices:
            pack_embedding_(module, matrices[id(module.weight)])
    _load_rest(model, shards)
    forget_quantization_(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(_of_plain_strides)
    return model.eval()


def _of_plain_strides(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The input of a dense Linear as if it were not a slice, such as the last token's hidden state in a prefill.

    By the strides of a slice torch chooses a batched product, for which it transposes and copies the weight, unless
    that requires gradients. The head of Qwen2.5-Coder-0.5B then takes 550 ms in place of 15 (two threads).
    """
    return tuple(x.flatten(0, -2).contiguous().view(x.shape) if x.dim() > 2 else x for x in inputs)


def open_model(
    source: str, dtype: str = "auto", device: str | torch.device = "cpu", *, causal: bool = True
) -> LoadedModel:
    """:func:`ace_ext.models.loading.load_model`; of a packed folder :func:`load_packed`, and of a folder of
    :mod:`ace_ext.packed.compressed_tensors` the dense model that its codes stand for. ``causal`` as there.

    Raises:
        InputError: as these functions, or ``dtype`` is not ``auto`` for a packed folder.
    """
    folder = Path(source).expanduser()
    if is_compressed(folder):
        model = _load_compressed(folder, dtype)
    elif not is_packed(source):
        return load_model(source, dtype, device, causal=causal)
    elif dtype != "auto":
        raise InputError(f"dtype must be auto for a packed folder (got {dtype}); unpack it first")
    else:
        model = load_packed(folder)
    if causal:
        check_causal(source, model)
    return LoadedModel(model.to(device), load_tokenizer(folder, needed=causal), source)


def _load_compressed(folder: Path, dtype: str) -> nn.Module:
    """The dense model that the codes of a folder stand for."""
    shards = CompressedShards(folder)
    model = skeleton(folder, shards, dtype, causal=False)
    check_all_read(model, shards, str(folder))
    _load_rest(model, shards)
    forget_quantization_(model)
    take_generation_config_(model, str(folder))
    return model.eval()


def _check_loaded(model: nn.Module, shards: Shards) -> None:
    """Raises :class:`InputError` if the files have no tensor for a parameter, under any of its names, or have more
    blocks than the model. The model may lack whole parts, such as a vision tower."""
    for name in not_stored(model, shards):
        raise InputError(
            f"{str(shards.folder)!r} does not hold {name} of {type(model).__name__}; load a packed folder with "
            "AutoModelForCausalLM"
        )
    unread = set(shards.unread(model))
    lists = {_list_of(name) for name in shards.entries.keys() - unread} - {None}
    left = [name for name in unread if _list_of(name) in lists and not is_left_out(model, name)]
    check_fit(str(shards.folder), [], left)


def _list_of(name: str) -> str | None:
    """``model.layers`` of the tensor ``model.layers.2.mlp.up_proj.weight``; None if it is in no numbered module."""
    found = re.match(r"(.+?)\.\d+\.", name)
    return found[1] if found else None


def _matrices(model: nn.Module, shards: PackedShards) -> dict[int, PackedMatrix | QuantizedMatrix]:
    """The packed weights of the model's Linears and embeddings, by the parameter's id: modules can share one."""
    found: dict[int, PackedMatrix | QuantizedMatrix] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not _reads_packed(module):
            continue
        weight = shards.whole_name(f"{name}.weight")
        if weight is not None and id(module.weight) not in found:
            stored, wanted = shards.load(weight), tuple(module.weight.shape)
            if tuple(stored.shape) != wanted:
                raise InputError(f"{weight} must be {list(wanted)} by the configuration (got {list(stored.shape)})")
            if not isinstance(stored, Tensor):
                found[id(module.weight)] = stored.to(module.weight.dtype)
    for module in model.modules():  # whatever else reads a weight needs it dense
        if not _reads_packed(module):
            for parameter in module.parameters(recurse=False):
                found.pop(id(parameter), None)
    return found


def _reads_packed(module: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding]:
    """Whether a module of this kind can have a packed weight."""
    return isinstance(module, nn.Linear) or can_pack(module)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _load_rest(model: nn.Module, shards: Shards) -> None:
    """Loads the parameters that are still on the meta device, and the buffers that the files have. Parameters that the
    model's class computes are not in the files."""
    names = all_names(model)
    made: dict[int, nn.Parameter] = {}  # by the id on the meta device: modules may share one
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            stored = shards.stored_name(names[id(parameter)])
            computed = stored is None and is_computed(model, name)
            if id(parameter) not in made:
                value = (
                    torch.empty_like(parameter, device="cpu") if computed else _read(stored or name, parameter, shards)
                )
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            module._parameters[leaf] = made[id(parameter)]
            if computed:
                initialise_(model, owner)
    tie_weights_(model)
    for name, buffer in list(model.named_buffers()):
        if name in shards:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = shards.read(name).to(buffer.dtype)


def _read(name: str, like: Tensor, shards: Shards) -> Tensor:
    value = shards.read(name).to(like.dtype)
    if value.shape != like.shape:
        raise InputError(f"{name} must be {list(like.shape)} by the configuration (got {list(value.shape)})")
    return value
