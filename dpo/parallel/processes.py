"""Processes: start them, join them to a group, and exchange values between them."""

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dpo.run import stopping
from dpo.utils import UserError, end_with_parent, n_cores

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Limit of one collective. A dead process closes its connections, which its peers notice at once. This limit is for a
# machine that is gone, and for the work of one rank between two collectives, such as writing to a slow disk.
TIMEOUT = timedelta(minutes=30)
JOIN_TIMEOUT = timedelta(minutes=10)  # between the starts of a group's first and last process
SECONDS_TO_SPEAK = 10.0
SECONDS_TO_END = 5.0  # before each signal to processes whose group has failed
HEARTBEAT, DEAD_AFTER = 2.0, 60.0  # seconds


def _variables() -> Mapping[str, str]:
    """Return the environment with torchrun's variables, derived from those of `srun` if it started several tasks."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return os.environ
    first_node = re.sub(r"\[(\d+).*", r"\1", os.environ["SLURM_STEP_NODELIST"]).split(",")[0]
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_node,
        "MASTER_PORT": str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000),
        **os.environ,
    }


def joined() -> bool:
    """Return whether torchrun, `launch`, or srun with several tasks started this process as one of a group."""
    return {"RANK", "WORLD_SIZE"} <= _variables().keys()


def active() -> bool:
    """Return whether this process is inside `group`."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def rank() -> int:
    """Return this process's number in its group."""
    return int(_variables()["RANK"]) if joined() else 0


def world_size() -> int:
    return int(_variables()["WORLD_SIZE"]) if joined() else 1


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(_variables().get("LOCAL_RANK", "0")) if joined() else 0


def local_world_size() -> int | None:
    """Return the number of this group's processes on this machine; None if nobody said."""
    if not joined():
        return 1
    names = _variables()
    alone = names.get("SLURM_STEP_NUM_NODES") == "1"  # srun on one machine
    size = names.get("LOCAL_WORLD_SIZE", names["WORLD_SIZE"] if alone else None)
    return int(size) if size else None


def gpu_index() -> int:
    """Return the index of this process's GPU. `srun --gpus-per-task` shows each process its own GPU only."""
    return 0 if "SLURM_GPUS_PER_TASK" in os.environ else local_rank()


def is_main() -> bool:
    """Return whether this process writes the run's files and prints for the group."""
    return rank() == 0


def launch(worker: Callable[..., None], arguments: tuple[Any, ...], n: int, port: int | None) -> None:
    """Run `worker(*arguments)` in `n` new processes of one group. `port` is the store's; None: any free port.

    If one process fails, the others are ended. Signals to this process are passed on to them. Raises SystemExit with
    the exit code of the process that failed, or UserError if a signal killed it.
    """
    import torch.distributed as dist
    import torch.multiprocessing

    os.environ.setdefault("OMP_NUM_THREADS", str(max(n_cores() // n, 1)))
    try:
        store = dist.TCPStore("localhost", port or 0, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(f"fsdp_port={port} cannot be used: {str(error).splitlines()[0]}; leave it null") from error
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it names every process that it ends
    context: Any = torch.multiprocessing.start_processes(
        _start, (os.getpid(), worker, arguments, n, store.port), nprocs=n, join=False, start_method="spawn"
    )
    try:
        with stopping.passing_on(context.pids()):
            while not context.join(grace_period=SECONDS_TO_END):
                pass
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name is None:
            raise SystemExit(error.exit_code) from None
        if error.signal_name == "SIGTERM":  # before training: nothing to save
            raise stopping.Stopped from None
        if error.signal_name == "SIGINT":
            raise KeyboardInterrupt from None
        raise UserError(
            f"process {error.error_index} of {n} was killed by {error.signal_name} (by the system, if memory ran out), "
            "and the others were stopped; checkpoints already written are complete"
        ) from error
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Return what `function` returns in a process of its own. Raise UserError if it is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process of {function.__name__} was killed (by the system, if memory ran out)"
            ) from error


def _start(index: int, parent: int, worker: Callable[..., None], arguments: tuple[Any, ...], n: int, port: int) -> None:
    """Run `worker` in a launched process, then exit."""
    end_with_parent(parent)
    values: dict[str, Any] = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    values |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in values.items()})
    faulthandler.enable()  # prints the stack if a library aborts
    code: Any = 0
    try:
        worker(*arguments)
    except SystemExit as end:  # the reason is printed already
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Python's own shutdown can hang or abort while threads of libraries still run.
    os._exit(code if isinstance(code, int) else 1)


@contextlib.contextmanager
def group(device: "torch.device") -> Iterator[None]:
    """Join the group of processes on entering. Leave it after success, or if training stopped early on request."""
    import torch
    import torch.distributed as dist

    # Python's handlers do not run inside a collective, so signals must end the process themselves.
    for number in stopping.ENDS:
        signal.signal(number, signal.SIG_DFL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    except stopping.Stopped:
        dist.barrier()  # the first process to exit ends the others
        raise
    dist.destroy_process_group()


def _join(backend: str) -> None:
    """Find the other processes, and connect to them. Raises UserError if one is missing after JOIN_TIMEOUT."""
    import torch.distributed as dist

    os.environ.update(_variables())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this job did not find each other within {JOIN_TIMEOUT} ({reason}): check that all of "
            "them were started, and can reach MASTER_ADDR and MASTER_PORT"
        ) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def fails_first() -> bool:
    """Return whether this process prints why the group fails: the first that asks does."""
    if not active():
        if not is_main():
            # If the main process fails in the same way, it ends this one meanwhile. Else this one has to speak.
            time.sleep(SECONDS_TO_SPEAK)
        return True
    try:
        return _store().add("failures", 1) == 1
    except RuntimeError:  # the store is gone, and so is the process that held it
        return True


def from_main(value: T) -> T:
    """Return the main process's `value` in every process. A collective."""
    values = [value]
    if active():
        import torch.distributed as dist

        dist.broadcast_object_list(values)
    return values[0]


def gather(value: T, group: Any = None) -> list[T]:
    """Return every process's `value`, in the order of ranks. `group`: a `side_group`; None: the default one."""
    values: list[Any] = [value]
    if active():
        import torch.distributed as dist

        values = [None] * world_size()
        dist.all_gather_object(values, value, group=group)
    return values


def any_process(value: bool) -> bool:
    """Return whether `value` is true in any process of the group."""
    return any(gather(value))


def side_group() -> Any:
    """Return a group of the same processes, for collectives of a second thread. A collective."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=TIMEOUT) if active() else None


@contextlib.contextmanager
def one_per_machine_first() -> Iterator[None]:
    """Run the block, which fills a cache, in the first process of each machine, then in the others.

    The block may take hours, longer than a collective may wait. So the first processes send heartbeats through the
    store, and the others watch them. Raises UserError if the heartbeats of one end before its block does.
    """
    if not active():
        yield
        return
    first = local_rank() == 0
    key = f"{from_main(uuid.uuid4().hex)}/{rank()}"
    keys = gather(key if first else "")
    if first:
        with _heartbeats(key):
            yield
        _store().set(f"{key}/done", "")
    for process, its_key in enumerate(keys):
        if its_key:
            _wait_for(process, its_key)
    if not first:
        yield


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


@contextlib.contextmanager
def _heartbeats(key: str) -> Iterator[None]:
    """Count up `key` in the store every few seconds, until the block ends."""
    store, ended = _store(), threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and its readers with it
            while not ended.wait(HEARTBEAT):
                store.add(key, 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _wait_for(process: int, key: str) -> None:
    """Wait until `process` has set `key`/done. Raises UserError if its heartbeats end before."""
    store = _store()
    seen, since = -1, time.monotonic()
    while not store.check([f"{key}/done"]):
        beats = store.add(key, 0)
        if beats != seen:
            seen, since = beats, time.monotonic()
        elif time.monotonic() - since > DEAD_AFTER:
            raise UserError(f"process {process} prepares the data, and gave no sign of life for {DEAD_AFTER:.0f} s")
        time.sleep(HEARTBEAT / 10)
