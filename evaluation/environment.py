"""What the figures were measured on: processor, instruction sets, threads, versions, the GPU and its state."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from common.threads import available_cores
from common.versions import installed_versions
from evaluation.results import Environment

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "onnx",
    "onnxruntime",
    "torch-tensorrt",
    "tensorrt",
    "numpy",
)
INSTRUCTIONS = (
    "avx2",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "sve",
)
"""CPU flags that decide which kernels an engine can choose (x86, then Arm), as Linux spells them."""
GPU_QUERY = (
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "temperature.gpu",
    "clocks_event_reasons.active",
)


def environment(device: int = 0) -> Environment:
    """Describe this machine. ``device`` is the index of the GPU."""
    import torch

    processor, flags = _processor()
    gpu, details = None, {}
    if torch.cuda.is_available() and device < torch.cuda.device_count():
        gpu = torch.cuda.get_device_name(device)
        details = {
            "compute capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "CUDA": str(torch.version.cuda),
            **gpu_state(device),
        }
    return Environment(
        processor=processor,
        instructions=[flag for flag in INSTRUCTIONS if flag in flags],
        cores=available_cores(),
        threads=torch.get_num_threads(),
        memory=_memory(),
        system=f"{platform.system()} {platform.release()}",
        versions={"python": platform.python_version(), **installed_versions(*PACKAGES)},
        gpu=gpu,
        gpu_details=details,
    )


def gpu_state(device: int = 0) -> dict[str, str]:
    """Driver, clocks, power and temperature as ``nvidia-smi`` reports them now; empty where it cannot be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, f"--id={device}", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().splitlines()[0].split(",")] if answer.strip() else []
    return dict(zip(GPU_QUERY, values, strict=True)) if len(values) == len(GPU_QUERY) else {}


def _processor() -> tuple[str, set[str]]:
    """The CPU's model and its flags."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return name, flags
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return name, flags


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
