"""The mailbox between driver and ranks. Trainings on Ray are in tests/integration/test_train_ray.py."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from reinforce.training.distributed.mailbox import Mailbox


def test_the_screen_gets_each_line_once_and_the_last_bar() -> None:
    async def exchange() -> None:
        mailbox = Mailbox()
        await mailbox.log("one")
        await mailbox.draw(("a", 1, 9))
        await mailbox.draw(("b", 2, 9))
        await mailbox.log("two")
        assert await mailbox.read_screen() == (["one", "two"], ("b", 2, 9), 0)
        assert await mailbox.read_screen() == ([], None, 0)

    asyncio.run(exchange())


def test_restarts_are_counted() -> None:
    async def exchange() -> None:
        mailbox = Mailbox()
        assert [await mailbox.report_start() for _ in range(3)] == [0, 1, 2]
        assert (await mailbox.read_screen())[2] == 3

    asyncio.run(exchange())


def test_a_stop_request_reaches_a_rank_that_waits_for_it() -> None:
    async def exchange() -> None:
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.wait_for_stop())
        await asyncio.sleep(0)
        assert not waiting.done()
        await mailbox.request_stop(15)
        assert await waiting == 15
        assert await mailbox.outcome() == ({}, 0), "the ranks have not stopped yet"
        await mailbox.report_stopped(15)
        assert await mailbox.outcome() == ({}, 15)

    asyncio.run(exchange())


def test_user_errors_are_kept_by_rank() -> None:
    async def exchange() -> None:
        mailbox = Mailbox()
        await mailbox.report_user_error(1, "second")
        await mailbox.report_user_error(0, "first")
        assert await mailbox.outcome() == ({0: "first", 1: "second"}, 0)

    asyncio.run(exchange())


def test_its_process_imports_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys; import reinforce.training.distributed.mailbox\n"
        "sys.exit(not {'torch', 'open_clip'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
