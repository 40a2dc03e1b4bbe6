"""PyTorch's files from elsewhere: loaded without running code, within the bounds of the file."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from common.errors import InputError, first_line

_OTHER: Final = re.compile(r"GLOBAL (\S+) was not an allowed global")
"""In PyTorch's message: the class or function of the user's that a file names."""


def load_archive(path: Path, *, legacy: bool = False) -> Any:
    """``torch.load`` of plain values and tensors, on the CPU.

    The tensors are views of the mapped file, which is what bounds them: ``torch.load`` into memory believes the sizes
    that a file claims for its tensors, and reads past the end of what is there (2.8).

    Args:
        path: An existing file.
        legacy: Whether the format from before PyTorch 1.6 is taken too, in which many published weights are.

    Raises:
        InputError: damaged, compressed, or holding more than plain values and tensors.
    """
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            with zipfile.ZipFile(path) as content:
                unpacked = sum(entry.file_size for entry in content.infolist())
                compiled = any(name.endswith("/constants.pkl") for name in content.namelist())
            if compiled:
                raise InputError(f"{path} is a TorchScript program, which is code: save its state_dict instead")
            if unpacked > path.stat().st_size:
                raise InputError(f"{path} is compressed, which torch.save never does: it is not loaded for safety")
        elif not legacy:
            raise InputError(f"{path} is damaged or not a checkpoint: it is no archive of torch.save")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except InputError:
        raise
    except Exception as error:
        # torch, zipfile and pickle raise a dozen unrelated types on damaged files.
        if isinstance(error, pickle.UnpicklingError) and (other := _OTHER.search(str(error))):
            raise InputError(
                f"{path} holds an object of {other[1]:.80}, which is not loaded for safety: save tensors by name "
                "alone, as in torch.save(model.state_dict(), path)"
            ) from error
        # PyTorch's own message is advice to load the file in spite of the risk.
        reason = "no file of torch.save" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise InputError(f"{path} is damaged, or holds more than tensors and plain values: {reason:.200}") from error


def is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of real numbers in memory of its own, as every weight is.

    A file may also hold sparse, quantized or complex tensors, tensors without data, and tensors whose elements share
    memory, which are larger than the file.
    """
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
