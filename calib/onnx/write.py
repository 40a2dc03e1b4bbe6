"""Writing ONNX files: whole or not at all, and never over what is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError

if TYPE_CHECKING:
    import onnx


def refuse_own_input(outputs: Sequence[Path | None], inputs: Sequence[Path]) -> None:
    """Refuse to write a file over one that is read, two into one, or one over a folder.

    Raises:
        InputError: as said.
    """
    given = [path.resolve() for path in outputs if path is not None]
    for path in given:
        if path in [other.resolve() for other in inputs] or given.count(path) > 1:
            raise InputError(f"{path} is read here, or written twice: give the result another name")
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")


def write_model(path: Path, model: onnx.ModelProto, source: Path) -> None:
    """Write a network atomically; external weights are named as they lie beside ``source``, or taken in.

    Raises:
        InputError: the file cannot be written.
    """
    import onnx

    from calib.onnx.model import external_weights
    from common.files import write_bytes

    if path.resolve().parent != source.resolve().parent and any(True for _ in external_weights(model)):
        onnx.load_external_data_for_model(model, str(source.parent))
    try:
        content = model.SerializeToString()
    except Exception as error:  # protobuf raises its own types where 2 GiB are exceeded
        raise InputError(
            f"{path} would exceed 2 GiB, which no ONNX file can: write it to {source.parent}, where the weights lie"
        ) from error
    write_bytes(path, content)
