"""The hot path: an OpenAI-compatible server over aiohttp, bytes in and bytes out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp.payload import BytesIOPayload, BytesPayload, Payload
from multidict import CIMultiDict
from yarl import URL

from service import __version__
from service.domain import Call, Operation
from service.errors import UpstreamError, UpstreamProtocolError
from service.ports import StreamedAnswer, WholeAnswer
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

LARGE_BYTES: Final = 1024 * 1024
REQUEST_ID_HEADER: Final = "x-request-id"


class DirectUpstream:
    """An upstream reached by plain HTTP. `base_url` ends where OpenAI's `https://api.openai.com/v1` does."""

    def __init__(
        self,
        name: str,
        *,
        provider: str,
        base_url: str,
        api_key: str | None = None,
        connect_timeout_seconds: float = 5.0,
        max_connections: int = 0,
    ) -> None:
        self.name = name
        self.provider = provider
        self._api_key = api_key
        self._base_url = base_url.rstrip("/")
        self._urls = {operation: URL(f"{self._base_url}/{operation.value}") for operation in Operation}
        self._headers = CIMultiDict(
            {
                "Content-Type": "application/json",
                "User-Agent": f"weir/{__version__}",
                "Accept": "*/*",
                # Compression between neighbours costs more time than it saves, and delays streams.
                "Accept-Encoding": "identity",
            }
        )
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # Whole-request deadlines belong to the core, which knows the caller; here only the connection's.
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_seconds)
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    async def send(self, call: Call) -> WholeAnswer | StreamedAnswer:
        headers = self._headers
        if call.headers:
            headers = CIMultiDict(headers)
            headers.update(call.headers)
        response = await self._request("POST", self._urls[call.operation], headers, call.body)
        try:
            if response.status != 200:
                raise await self._rejection(response)
            check_content_type(
                response.headers.get("Content-Type", ""), stream=call.stream, status=response.status
            )
            if call.stream:
                return _Stream(response)
            return WholeAnswer(
                await _read_whole(response), clean_request_id(response.headers.get(REQUEST_ID_HEADER))
            )
        except BaseException:
            response.close()
            raise

    async def models(self) -> Sequence[dict[str, Any]]:
        response = await self._request("GET", URL(f"{self._base_url}/models"), self._headers, None)
        try:
            if response.status != 200:
                raise await self._rejection(response)
            body = await _read_whole(response)
        finally:
            response.close()
        return read_models(body)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(
        self, method: str, url: URL, headers: CIMultiDict[str], body: bytes | None
    ) -> aiohttp.ClientResponse:
        try:
            return await self._open_session().request(
                method,
                url,
                data=_payload(body) if body is not None else None,
                headers=headers,
                allow_redirects=False,
            )
        except aiohttp.ConnectionTimeoutError:
            raise connect_timeout() from None
        except aiohttp.ClientConnectorCertificateError:
            raise unreachable("its certificate is not trusted") from None
        except aiohttp.ClientSSLError:
            raise unreachable("no TLS connection could be made") from None
        except aiohttp.ClientConnectorDNSError:
            raise unreachable("its name is not known") from None
        except aiohttp.ClientConnectorError:
            raise unreachable("the connection was refused") from None
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            raise unreachable("it closed the connection") from None
        except aiohttp.ClientError:
            raise UpstreamProtocolError("The upstream answered something that is not HTTP.") from None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections, ttl_dns_cache=30),
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def _rejection(self, response: aiohttp.ClientResponse) -> UpstreamError:
        body = b""
        try:
            while len(body) < MAX_ERROR_BYTES and (more := await response.content.readany()):
                body += more
        except (aiohttp.ClientError, ConnectionError):
            pass  # the status says enough
        return rejection(
            response.status,
            body,
            retry_after=response.headers.get("Retry-After"),
            request_id=clean_request_id(response.headers.get(REQUEST_ID_HEADER)),
            secret=self._api_key,
        )


class _Stream:
    """A StreamedAnswer over an aiohttp response; aiohttp stops reading while nobody calls `read`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.upstream_request_id = clean_request_id(response.headers.get(REQUEST_ID_HEADER))

    async def read(self) -> bytes:
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, ConnectionError) as error:
            # aiohttp keeps this error with its reader; its traceback would keep the whole request.
            error.__traceback__ = None
            raise broken_stream() from None

    async def close(self) -> None:
        # At its end aiohttp has given the connection back already, and this does nothing.
        self._response.close()


def _payload(body: bytes) -> Payload:
    """Large bodies go piece by piece: one write of many megabytes would hold up every stream."""
    return BytesPayload(body) if len(body) <= LARGE_BYTES else BytesIOPayload(io.BytesIO(body))


async def _read_whole(response: aiohttp.ClientResponse) -> bytes:
    try:
        return await response.read()
    except (aiohttp.ClientError, ConnectionError):
        raise broken_answer() from None


def read_models(body: bytes) -> Sequence[dict[str, Any]]:
    """The `data` of OpenAI's list of models. Raises UpstreamProtocolError."""
    try:
        listed = msgspec.json.decode(body)
        return [model for model in listed["data"] if isinstance(model["id"], str)]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise UpstreamProtocolError("The upstream's list of models cannot be read.") from None
