"""The admin port's socket."""

from __future__ import annotations

import asyncio
import socket

from service.adminport import listen


async def test_an_answers_body_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    accepted: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer.get_extra_info("socket"))
        writer.close()

    listener = listen("ADMIN_PORT", "127.0.0.1", 0)
    async with await asyncio.start_server(connected, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()
