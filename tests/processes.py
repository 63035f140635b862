"""Processes that are forked from one that has imported everything: a test pays for imports once, not once a process.

`words` are those after `python`: `-m quantkd capture ...`, or a script and its arguments. Several processes find each
other by the variables that `torchrun` sets; tests/test_distributed.py has those of a real launcher, too.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_IMPORTS = "bitsandbytes datasets peft torch transformers.trainer trl quantkd.training.trainer quantkd.cli.capture"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([*_IMPORTS.split(), "quantkd.cli.evaluate", "quantkd.cli.train", "quantkd.experiment"])
_SECONDS = 240


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(
    words: Sequence[object], output: Path, processes: int = 1, variables: Mapping[str, str] | None = None
) -> list[BaseProcess]:
    """Start them, with more environment variables; standard output and standard error of all go to `output`."""
    port, family = free_port(), []
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in group.items()} if processes > 1 else {}
        environment |= variables or {}
        # A daemon, for this process must not wait at its end for one that a failed test has left.
        arguments = ([str(word) for word in words], environment, str(output))
        family.append(_FORKS.Process(target=_run, args=arguments, daemon=True))
        family[-1].start()
    return family


def end(process: BaseProcess, seconds: float = _SECONDS) -> int:
    """Wait until it ends; its exit code. One that does not end is killed, and the test fails."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{process.name} has not ended within {seconds} seconds")
    return process.exitcode


def wait_until(reached: Callable[[], object], family: Sequence[BaseProcess], output: Path) -> None:
    """Wait for what happens while all of them are at work."""
    deadline = time.monotonic() + _SECONDS
    while not reached():
        assert all(process.is_alive() for process in family), f"ended too early: {output.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"waited {_SECONDS} seconds in vain: {output.read_text()[-4000:]}"
        time.sleep(0.0005)


def run(words: Sequence[object], output: Path, processes: int = 1, variables: Mapping[str, str] | None = None) -> str:
    """Start them, and wait until they end without an error; what they printed."""
    family = start(words, output, processes, variables)
    try:
        for process in family:
            assert end(process) == 0, f"{process.name} ended with exit code {process.exitcode}"
    except AssertionError as error:
        raise AssertionError(f"{error}: {output.read_text()[-4000:]}") from None
    finally:
        for process in family:
            process.kill()
    return output.read_text()


def _run(words: list[str], environment: dict[str, str], output: str) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not searched for garbage, nor its pages copied for that
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what runs in the background
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
