"""Several local processes that train one task together: `cornucopia launch --workers=2 TASK …`, to try it out."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

GRACE = 10.0  # seconds that a worker has to end before it is killed


def launch(task: str, words: list[str], *, workers: int, runs: str, name: str) -> int:
    """Start the workers of one run, and wait; see `together`."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    cluster = {"worker": addresses}
    roles = [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})}
             for index in range(workers)]  # fmt: skip
    words = ["train", task, *words, "--strategy=multiworker", f"--name={name}", f"--runs={runs}"]
    return together(words, roles, folder=Path(runs) / name, title=", ".join(addresses))


def together(words: list[str], roles: list[dict[str, str]], *, folder: Path, title: str) -> int:
    """Run the command in a process for each role, its environment, and wait; return the exit code.

    Each writes `FOLDER/worker-N.log`, the first also here. When one fails, the others, which would wait for it for
    ever, are stopped. Ctrl-C and SIGTERM stop them all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-c", "from shared.command import main; main()", *words]
    first = folder / "worker-0.log"
    told = first.stat().st_size if first.exists() else 0
    processes, logs = [], []
    for index, role in enumerate(roles):
        log = (folder / f"worker-{index}.log").open("a")  # of a run that goes on, what was told before stays
        logs.append(log)
        environment = {**os.environ, **role, "PYTHONUNBUFFERED": "1"}
        processes.append(subprocess.Popen(program, stdout=log, stderr=subprocess.STDOUT, env=environment))
    stopping = []
    before = {
        number: signal.signal(number, lambda *_: stopping.append(1)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    print(f"workers    {title}; logs in {folder}/worker-*.log", flush=True)
    try:
        return _attend(processes, first, told, stopping)
    finally:
        _stop(processes)
        for log in logs:
            log.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _attend(processes: list[subprocess.Popen], log: Path, told: int, stopping: list) -> int:
    with log.open() as first:
        first.seek(told)
        while True:
            print(first.read(), end="", flush=True)
            codes = [process.poll() for process in processes]
            failed = [index for index, code in enumerate(codes) if code]
            if failed:
                print(first.read(), end="")
                index = failed[0]
                print(f"launch     worker {index} ended with exit code {codes[index]}; the others are stopped; see "
                      f"{log.parent / f'worker-{index}.log'}", flush=True)  # fmt: skip
                return 1
            if all(code == 0 for code in codes):
                print(first.read(), end="", flush=True)
                return 0
            if stopping:
                print("launch     stopped; go on with --resume", flush=True)
                return 130
            time.sleep(0.1)


def _stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
