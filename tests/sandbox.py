"""Runs a function in a forked process that sees what it opens and cannot take much memory."""

import gc
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import end

_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.remove")
_FORBIDDEN += ("os.rename", "os.mkdir", "shutil.", "pickle.", "marshal.loads", "ctypes.dlopen", "import")
_FORBIDDEN += ("urllib.", "http.", "ftplib.", "smtplib.")


class Watch:
    """An audit hook that can be switched on; it notes forbidden events and files outside the allowed folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = str(folder.resolve()), False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            if not os.path.abspath(os.fsdecode(args[0])).startswith(self.folder):
                self.seen.append(f"open {args[0]!r}")
        elif event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {args!r}"[:200])

    def run(self, function: Callable[[], Any], seconds: float) -> Any:
        """Call `function`; anything forbidden, or more than `seconds`, fails."""
        began = time.monotonic()
        self.on = True
        try:
            return function()
        finally:
            self.on = False
            assert not self.seen, self.seen
            assert time.monotonic() - began < seconds, f"took {time.monotonic() - began:.1f} s"


def in_sandbox(function: Callable[[Watch], None], folder: Path, mebibytes: int = 256) -> None:
    """Run `function(watch)` in a fork whose address space may grow by `mebibytes`; raise what it raises."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        try:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + mebibytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            function(Watch(folder))
            sender.send(None)
        except BaseException:
            sender.send(traceback.format_exc())

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    sender.close()  # the child's is the last one, so that its death ends the wait
    try:
        assert receiver.poll(600), "the sandbox has not ended within 600 seconds"
        failure = receiver.recv()
    except EOFError:
        failure = f"the sandbox died with exit code {end(process, 10)}"
    finally:
        process.kill()
    assert failure is None, failure
