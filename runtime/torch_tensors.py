"""Outputs of a request as tensors of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnxsplit.errors import InputError, MissingDependency, one_line, shown
from onnxsplit.tensors import ML_DTYPES, Array, dtype_name

if TYPE_CHECKING:
    import torch


def to_torch(outputs: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """The outputs of a request as tensors of PyTorch, by name. They share the arrays' memory; nothing is copied.

    Raises:
        MissingDependency: PyTorch is not installed.
        InputError: an output holds strings, or PyTorch has not its type.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("PyTorch is not installed: pip install torch") from error
    if not isinstance(outputs, Mapping) or not all(isinstance(array, np.ndarray) for array in outputs.values()):
        raise InputError(f"to_torch takes the outputs of a request, arrays by name, and not {shown(outputs)}")
    tensors = {}
    for name, array in outputs.items():
        onnx_type = dtype_name(array.dtype)
        narrow = ML_DTYPES.get(onnx_type or "")
        try:
            if narrow is None:
                tensors[name] = torch.from_numpy(array)
            else:
                bits = array.view(np.int16 if array.dtype.itemsize == 2 else np.uint8)
                tensors[name] = torch.from_numpy(bits).view(getattr(torch, narrow))
        except ValueError as error:
            raise InputError(f"output {shown(name)} cannot be shared with PyTorch: {one_line(error)}") from error
        except (TypeError, AttributeError) as error:
            raise InputError(
                f"output {shown(name)} has the type {onnx_type or shown(array.dtype)}, which PyTorch "
                f"{torch.__version__} does not have; use the array"
            ) from error
    return tensors
