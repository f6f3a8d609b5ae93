"""The driver's side of a training run on Ray: it shows the ranks' logs, forwards signals, and ends what cannot
continue."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from reinforce.cluster import ControlWatch, kill_with_placement_groups
from reinforce.errors import HostLost, RayEnded, UserError
from reinforce.processes.cores import describe_share
from reinforce.terminal import Screen
from reinforce.training.distributed.host_watch import HostWatch, RankHost
from reinforce.training.stop import Stopped, StopSignal

_TICK = 0.2
_WAITING_SECONDS = 30.0  # between messages while the cluster is too small
_RECEIPT_SECONDS = 30.0  # from a signal until a rank has received it; later, none runs
#: From SIGINT and other signals until the step and its checkpoint are finished. Whoever sends SIGTERM ends the machine
#: soon after, so what takes longer is left to the last checkpoint. A second SIGINT ends the training run at once.
_STOP_SECONDS, _TERMINATION_SECONDS = 600.0, 45.0
_CONTROL_SECONDS = 20.0  # without Ray's control service; Ray itself ends this process after 60


class Supervisor:
    """Runs Ray Train in a thread, because the main thread handles signals."""

    def __init__(self, mailbox: Any, hosts: Mapping[str, RankHost], ranks: int, cpus: float, gpus: float) -> None:
        """``hosts`` are those that were alive when the places on them were counted, by their nodes."""
        self._mailbox, self._ranks, self._share = mailbox, ranks, describe_share(cpus, gpus)
        self._hosts = HostWatch(mailbox, hosts, ranks, cpus, gpus)
        self._control, self._control_lost = ControlWatch(), 0.0
        self._stop, self._stopped_at, self._received = StopSignal(), 0.0, False
        self._waiting, self._started = time.monotonic(), False
        self._errors: list[Exception] = []

    def run(self, fit: Callable[[], Any]) -> None:
        """Call ``fit`` and wait for its end.

        Raises the error of ``fit``; Stopped after a signal; HostLost if a host was lost and the others cannot hold its
        ranks; RayEnded if Ray's control service has ended; and UserError for one that the ranks report.
        """
        thread = threading.Thread(target=self._call, args=(fit,), daemon=True)
        try:
            with self._stop.handle_signals(), Screen() as screen:
                thread.start()
                while thread.is_alive():
                    thread.join(_TICK)
                    self._show(screen)
                    if thread.is_alive():
                        self._check()
            self._raise_outcome()
        finally:
            self._hosts.close()
            self._control.close()
            self._end(thread.is_alive())

    def _call(self, fit: Callable[[], Any]) -> None:
        try:
            fit()
        except Exception as error:
            self._errors.append(error)

    def _show(self, screen: Screen) -> None:
        """Show what the ranks have sent since the last call, and what the driver waits for."""
        lines, bar, starts = ray.get(self._mailbox.read_screen.remote())
        for line in [*lines, *self._hosts.lines()]:
            screen.log(line)
        if bar is not None:
            screen.draw(*bar)
        now, self._started = time.monotonic(), starts > 0
        if (not starts or self._hosts.any_lost) and now - self._waiting > _WAITING_SECONDS:
            self._waiting = now
            screen.log(f"waiting until the cluster can hold {self._ranks} ranks with {self._share} each")

    def _check(self) -> None:
        """Raise what ends the training run before Ray Train does."""
        now = time.monotonic()
        if error := self._hosts.error():
            raise HostLost(error)
        self._control_lost = 0.0 if self._control.is_alive() else self._control_lost or now
        if self._control_lost and now - self._control_lost > _CONTROL_SECONDS:
            raise RayEnded(
                "Ray's control service ended before the training did: its process (gcs_server) was killed, perhaps for "
                "lack of memory, or crashed. Run the same command again, which resumes from the last checkpoint."
            )
        if not self._stop.signum:
            return
        if not self._stopped_at:
            self._stopped_at = now
            self._mailbox.request_stop.remote(self._stop.signum)
        self._received = self._received or ray.get(self._mailbox.stop_received.remote())
        limit = _RECEIPT_SECONDS
        if self._received:
            limit = _TERMINATION_SECONDS if self._stop.signum == signal.SIGTERM else _STOP_SECONDS
        if not self._started or self._hosts.any_lost or now - self._stopped_at > limit:
            raise Stopped(self._stop.signum)  # no rank can stop by itself

    def _raise_outcome(self) -> None:
        """Raise what the ranks, or else Ray Train, report as the end."""
        user_errors, signum = ray.get(self._mailbox.outcome.remote())
        if user_errors:
            raise UserError(user_errors[min(user_errors)])
        if signum:
            raise Stopped(signum)
        if self._errors:
            lost = self._hosts.error(failed=True)
            raise self._errors[0] if lost is None else HostLost(lost) from self._errors[0]

    def _end(self, running: bool) -> None:
        """End Ray Train's controller and its ranks if they run, and the mailbox, which has a reference to it."""
        if self._control_lost:
            return  # requests to it would wait
        with contextlib.suppress(RayError):
            controller = ray.get(self._mailbox.close.remote())
            if running and controller is not None:
                kill_with_placement_groups(controller)
            ray.kill(self._mailbox)
