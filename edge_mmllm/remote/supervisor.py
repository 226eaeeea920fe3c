"""Runs on the device, by itself (this file is copied and needs only Python's own library).

    python3 supervisor.py IN OUT ERR SECONDS -- COMMAND...

Starts COMMAND in a session of its own, with the files IN as its input and OUT and ERR for its
output, and ends all of it when standard input ends or stays silent for SECONDS: the connection is
gone, and nothing of ours may stay behind. The last line of its own output is JSON: {"status": N}
(negative: a signal) or {"gone": true}.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress


def main() -> int:
    """The supervisor; returns its exit status."""
    source, out, err, silence, mark, *command = sys.argv[1:]
    if mark != "--" or not command:
        return 2
    with open(source, "rb") as given, open(out, "wb") as out_file, open(err, "wb") as err_file:  # noqa: PTH123
        child = subprocess.Popen(
            command, stdin=given, stdout=out_file, stderr=err_file,
            start_new_session=True,
        )  # fmt: skip
        gone = False
        try:
            for name in ("SIGHUP", "SIGTERM", "SIGINT"):
                signal.signal(getattr(signal, name), lambda *_: sys.exit(1))
            heard = time.monotonic()
            while child.poll() is None:
                ready, _, _ = select.select([0], [], [], 0.1)
                now = time.monotonic()
                if ready:
                    if not os.read(0, 4096):
                        gone = True
                        break
                    heard = now
                elif now - heard > float(silence):
                    gone = True
                    break
        finally:
            with suppress(OSError):  # the whole session: a bench has children of its own
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    with suppress(OSError):
        print(json.dumps({"gone": True} if gone else {"status": child.returncode}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
