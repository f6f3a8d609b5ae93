"""Workers of Ray and fork servers of multiprocessing as forks of one process, because their imports take seconds.

That process does not import Ray, whose library reads a worker's variables when it is loaded. As a script, this stands
in for a worker or server: it asks for the fork, and each ends when the other does.
"""

from __future__ import annotations

import json
import os
import socket
import sys

#: The environment variable with the address of that process. Without it, workers start as those of users do.
ADDRESS = "TESTS_FORKS"
_IMPORTED = (
    "reinforce.engine.worker.shard",
    "reinforce.tuning.results",
    "s3fs",
    "requests",
    "google.protobuf.json_format",
)
_started: list[object] = []  # kept, because Python warns of processes that nothing refers to


def worker_command(address: str) -> list[str]:
    """Return what starts a fork instead of Python, and start the process that forks unless it runs."""
    import subprocess

    with _socket() as listener:
        try:
            listener.bind(f"\0{address}")
        except OSError:
            pass  # it runs
        else:
            listener.listen()
            command = [sys.executable, __file__, "serve", str(listener.fileno()), address.rpartition("-")[2]]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as workers have it
            files: dict[str, int] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            _started.append(
                subprocess.Popen(
                    command, env=environment, pass_fds=[listener.fileno()], start_new_session=True, **files
                )
            )
    return [sys.executable, "-I", "-S", __file__, address]


def fork_processes() -> None:
    """Let fork servers and processes that ``multiprocessing`` spawns be forks too."""
    from multiprocessing import util

    def spawn(path: bytes, args: list[str], passfds: list[int]) -> int:
        return start(path, [*worker_command(os.environ[ADDRESS]), *args[args.index("-c") :]], passfds)

    start, util.spawnv_passfds = util.spawnv_passfds, spawn


def _socket(descriptor: int | None = None) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptor)


def _ask(address: str, *arguments: str) -> None:
    files = [number for number in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{number}")]
    connection = _socket()
    connection.connect(f"\0{address}")
    message = json.dumps([os.getcwd(), dict(os.environ), files, arguments])
    socket.send_fds(connection, [message.encode()], files)
    connection.recv(1)


def _serve(descriptor: int, session: int) -> None:
    import gc
    import importlib
    import signal

    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # multiprocessing blocks signals while it starts a process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = _socket(descriptor)
    listener.settimeout(1.0)
    while os.path.exists(f"/proc/{session}"):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _work(connection)
        connection.close()


def _work(connection: socket.socket) -> None:
    import fcntl
    import runpy
    import shlex
    import threading

    message, received, _, _ = socket.recv_fds(connection, 2**20, 16)
    folder, environment, files, arguments = json.loads(message)
    below = connection.detach(), *received  # the number of one may be that which another has to get
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, max(files) + 1) for file in below]
    for file in below:
        os.close(file)
    for number, file in zip(files, above[1:], strict=True):
        os.dup2(file, number)
    connection = _socket(above[0])
    os.setsid()  # Ray kills the process group of a worker that has ended
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=lambda: (connection.recv(1), os._exit(1)), daemon=True).start()

    def run(path: str, *words: str) -> None:
        if path == "-c":
            sys.argv[:] = path, *words[1:]
            return exec(words[0], {"__name__": "__main__"})
        sys.argv[:] = path, *words
        sys.path[0] = os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")

    # Ray's first program sets the variables of the worker, and would become the second by a command of a shell.
    vars(os)["execvp"] = lambda _, args: run(*shlex.split(args[-1])[2:])
    run(*arguments)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(*map(int, sys.argv[2:]))
    else:
        _ask(*sys.argv[1:])
