"""Running the command line, in this process or in one of its own."""

import json
import subprocess
import sys
from dataclasses import dataclass

KVPOLICY = [sys.executable, "-c", "from kvpolicy.cli import main; main()"]
FAST = ["--context", "64", "--dtype", "float32"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        assert self.out, self.err
        return json.loads(self.out)

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("kvpolicy: error:")]

    @property
    def warnings(self):
        return [line for line in self.err.splitlines() if line.startswith("kvpolicy: warning:")]


def in_a_process(*arguments, **more):
    """A run of its own, as from a shell."""
    done = subprocess.run([*KVPOLICY, *map(str, arguments)], capture_output=True, text=True, timeout=180, **more)
    return Result(done.returncode, done.stdout, done.stderr)
