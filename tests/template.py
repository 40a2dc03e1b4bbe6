"""A process that has imported everything and forks one command for each request: the tests' way to many starts.

Importing PyTorch and Lightning takes seconds, forking takes milliseconds. What is forked is a process of its own that
runs the real command, `train.py` or another, and can be killed like any other. Requests and answers are JSON lines.
"""

import ctypes
import gc
import json
import mmap
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

SHIM = os.environ.get("FAULT_SHIM")
ACTIONS = {"count": 0, "kill": 1, "tear": 2, "fail": 3, "full": 4, "raise": 5}


def warm() -> None:
    """Import what the commands import; nothing here may start a thread."""
    import lightning.pytorch
    import onnx
    import onnxruntime.quantization
    import sklearn.datasets
    import torch
    import torchmetrics.classification
    import torchvision
    from torch.utils.tensorboard import SummaryWriter

    import common.cli
    import data
    import engines.eager
    import engines.onnx.export
    import engines.onnxruntime.engine
    import evaluation.pipeline
    import evaluation.report
    import models.fit

    used = (lightning.pytorch, onnx, onnxruntime, sklearn.datasets, torch, torchmetrics.classification, torchvision)
    assert all((*used, SummaryWriter, common.cli, data, engines, evaluation, models))
    # What is there stays where it is, shared with what is forked.
    gc.collect()
    gc.freeze()


def child(request: dict[str, Any], counter: mmap.mmap) -> NoReturn:
    os.setsid()
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    # What the template was started with does not matter: a command starts with the usual handlers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(request["cwd"])
    if (variables := request["variables"]) is not None:
        os.environ.clear()
        os.environ.update(variables)
    script, *arguments = request["argv"]
    sys.argv = [script, *arguments]
    if fault := request.get("fault"):
        shim = ctypes.CDLL(SHIM)
        address = ctypes.addressof(ctypes.c_char.from_buffer(counter))
        shim.fault_arm(
            os.fsencode(fault["folder"]),
            ctypes.c_void_p(address),
            ctypes.c_long(fault["at"]),
            ACTIONS[fault["action"]],
            fault.get("detail", 0),
        )
    code: Any = 0
    try:
        if script.endswith(".py"):
            sys.path[0] = str(Path(script).parent)
            runpy.run_path(script, run_name="__main__")
        else:
            sys.path[0] = request["cwd"]
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        # Before the command took over: Python ends like this.
        code = 130
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    finally:
        # As the interpreter does when it ends, but without the template's frames above.
        import threading

        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    warm()
    counters: dict[int, mmap.mmap] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            counter = mmap.mmap(-1, 8)
            pid = os.fork()
            if pid == 0:
                child(request, counter)
            counters[pid] = counter
            answer: dict[str, Any] = {"pid": pid}
        else:
            pid = request["pid"]
            deadline = time.monotonic() + request["timeout"]
            done, status = os.waitpid(pid, os.WNOHANG)
            while not done and time.monotonic() < deadline:
                time.sleep(0.005)
                done, status = os.waitpid(pid, os.WNOHANG)
            late = not done
            if late:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            counter = counters.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            answer = {"code": code, "late": late, "operations": int.from_bytes(counter[:8], "little")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
