"""Several Ray nodes on this machine, each a raylet of its own, and `ftray train` as a driver beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

NODE_MEMORY = 80 * 2**20


class Raylets:
    """A head that holds one worker, and nodes that come and go, of one CPU each."""

    def __init__(self, folder: Path) -> None:
        import ray._private.utils
        from ray.cluster_utils import Cluster

        known = ray._private.utils.write_ray_address
        ray._private.utils.write_ray_address = lambda *_args, **_options: None  # nobody is to find this one by chance
        try:
            options = {"num_cpus": 1, "object_store_memory": NODE_MEMORY, "include_dashboard": False}
            self._cluster = Cluster(initialize_head=True, head_node_args=options)
        finally:
            ray._private.utils.write_ray_address = known
        self.folder = folder

    def add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=NODE_MEMORY)

    def lose(self, node: Any) -> None:
        """SIGKILL for the raylet and all that belongs to it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: int) -> None:
        """What a cloud's notice of preemption comes to."""
        subprocess.run(
            [
                *("ray", "drain-node", "--address", self._cluster.address, "--node-id", node.node_id),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a drill"),
                *("--deadline-remaining-seconds", str(seconds)),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )

    def start(self, file: Path, *overrides: str) -> Driver:
        return Driver(
            subprocess.Popen(
                [sys.executable, "-m", "ftray.cli.main", "train", str(file), *overrides],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"RAY_ADDRESS": self._cluster.address},
                start_new_session=True,
            )
        )

    def close(self) -> None:
        self._cluster.shutdown()


class Driver:
    """`ftray train`, and what it says: its pipes are read as long as it lives, so that it never waits for a reader."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        pipes = [pipe for pipe in (process.stdout, process.stderr) if pipe]
        self._readers = [threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.lines.append(line.rstrip())

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def wait(self, seconds: float = 900) -> int:
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(timeout=5)  # the last lines; another process may still hold the pipe
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
