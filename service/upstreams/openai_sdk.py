"""An upstream reached through the official SDK: Azure's addresses and credentials, and its proxies.

The SDK makes the connection, the address and the headers; bodies pass as JSON and answers as bytes,
so that this adapter keeps the contract of `direct`. It costs more time a request than `direct`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import msgspec
import openai

from service.domain import Call
from service.errors import UpstreamError, UpstreamProtocolError, UpstreamRejected
from service.ports import StreamedAnswer, WholeAnswer
from service.upstreams.direct import read_models
from service.upstreams.rejection import (
    MAX_ERROR_BYTES,
    broken_answer,
    broken_stream,
    check_content_type,
    clean_request_id,
    connect_timeout,
    rejection,
    unreachable,
)


class OpenAISDKUpstream:
    """`base_url` as for the SDK; with `api_version` it is an Azure endpoint (https://NAME.openai.azure.com)."""

    def __init__(
        self,
        name: str,
        *,
        provider: str,
        base_url: str,
        api_key: str | None = None,
        api_version: str | None = None,
        connect_timeout_seconds: float = 5.0,
    ) -> None:
        self.name = name
        self.provider = provider
        self._api_key = api_key
        # Deadlines and retries belong to the core; here only the connection's own.
        timeout = httpx2.Timeout(None, connect=connect_timeout_seconds)
        self._client: openai.AsyncOpenAI = (
            openai.AsyncAzureOpenAI(
                azure_endpoint=base_url,
                api_version=api_version,
                api_key=api_key or "none",
                max_retries=0,
                timeout=timeout,
            )
            if api_version
            else openai.AsyncOpenAI(
                base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=timeout
            )
        )

    async def send(self, call: Call) -> WholeAnswer | StreamedAnswer:
        parameters = call.parameters if call.parameters is not None else _decode(call.body)
        try:
            response: httpx2.Response = await self._client.post(
                f"/{call.operation.value}",
                cast_to=httpx2.Response,
                body=parameters,
                options={"headers": {"Accept-Encoding": "identity", **dict(call.headers)}},
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )  # type: ignore[assignment]  # the SDK types stream=True as its own stream class
        except openai.OpenAIError as error:
            raise await self._translated(error) from None
        except httpx2.RequestError:  # while the SDK read an error's body: it lets this through
            raise unreachable("it closed the connection") from None
        request_id = clean_request_id(response.headers.get("x-request-id"))
        try:
            check_content_type(
                response.headers.get("content-type", ""), stream=call.stream, status=response.status_code
            )
            if call.stream:
                return _Stream(response, self._api_key)
            return WholeAnswer(await _read_whole(response), request_id, self._api_key)
        except BaseException as error:
            if isinstance(error, UpstreamError):
                error.upstream_request_id = request_id
            await response.aclose()
            raise

    async def models(self) -> Sequence[dict[str, Any]]:
        try:
            response = await self._client.get("/models", cast_to=httpx2.Response)
        except openai.OpenAIError as error:
            raise await self._translated(error) from None
        except httpx2.RequestError:
            raise unreachable("it closed the connection") from None
        return read_models(response.content)

    def note(self, key: str | None, error: UpstreamError) -> None:
        """Its one key never rests."""

    async def close(self) -> None:
        await self._client.close()

    async def _translated(self, error: openai.OpenAIError) -> UpstreamError:
        if isinstance(error, openai.APITimeoutError):
            return connect_timeout()
        if isinstance(error, openai.APIConnectionError):
            if isinstance(error.__cause__, httpx2.ConnectError):
                return unreachable("no connection could be made")
            return unreachable("it closed the connection")
        if isinstance(error, openai.APIStatusError):
            response = error.response
            return rejection(
                response.status_code,
                response.content[:MAX_ERROR_BYTES],
                retry_after=response.headers.get("retry-after"),
                request_id=clean_request_id(error.request_id),
                secret=self._api_key,
            )
        return UpstreamProtocolError("The SDK could not read the upstream's answer.")


async def _read_whole(response: httpx2.Response) -> bytes:
    try:
        return await response.aread()
    except httpx2.RequestError:
        raise broken_answer() from None


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError):
        raise UpstreamRejected(400, {"message": "The body is not JSON.", "code": "invalid_json"}) from None


class _Stream:
    """A StreamedAnswer over an httpx response."""

    def __init__(self, response: httpx2.Response, secret: str | None) -> None:
        self.secret = secret
        self._response = response
        self._chunks: AsyncIterator[bytes] = response.aiter_bytes()
        self.upstream_request_id: str | None = clean_request_id(response.headers.get("x-request-id"))

    async def read(self) -> bytes:
        try:
            async for chunk in self._chunks:
                if chunk:
                    return chunk
        except httpx2.RequestError:
            raise broken_stream() from None
        return b""

    async def close(self) -> None:
        await self._response.aclose()
