"""The hot path: an OpenAI-compatible server over aiohttp, bytes in and bytes out."""

from __future__ import annotations

import asyncio
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
from service.errors import (
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamProtocolError,
    UpstreamRateLimited,
)
from service.ports import StreamedAnswer, WholeAnswer
from service.routing.keys import LIMITED_SECONDS, REFUSED_SECONDS, KeyPool
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

ERROR_BODY_SECONDS: Final = 2.0
"""For what an upstream says beside the status of its error."""
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
        api_keys: Sequence[str] = (),
        connect_timeout_seconds: float = 5.0,
        max_connections: int = 0,
    ) -> None:
        self.name = name
        self.provider = provider
        self._keys = KeyPool(api_keys)
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
        self._with_key = {key: self._headers_with(key) for key in api_keys}
        # Whole-request deadlines belong to the core, which knows the caller; here only the connection's.
        # `connect` takes the look-up of the name in, which `sock_connect` does not; but the wait for one of a
        # limited number of connections, too, which is no fault of the upstream.
        self._timeout = aiohttp.ClientTimeout(
            total=None,
            connect=None if max_connections else connect_timeout_seconds,
            sock_connect=connect_timeout_seconds,
        )
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    async def send(self, call: Call) -> WholeAnswer | StreamedAnswer:
        key = self._keys.take()
        headers = self._with_key[key] if key is not None else self._headers
        if call.headers:
            headers = CIMultiDict(headers)
            headers.update(call.headers)
        response = await self._request("POST", self._urls[call.operation], headers, call.body)
        try:
            if response.status != 200:
                raise await self._rejection(response, key)
            check_content_type(
                response.headers.get("Content-Type", ""), stream=call.stream, status=response.status
            )
            if call.stream:
                return _Stream(response, key)
            id_there = clean_request_id(response.headers.get(REQUEST_ID_HEADER))
            return WholeAnswer(await _read_whole(response), id_there, key)
        except BaseException as error:
            if isinstance(error, UpstreamError):
                error.upstream_request_id = clean_request_id(response.headers.get(REQUEST_ID_HEADER))
            response.close()
            raise

    async def models(self) -> Sequence[dict[str, Any]]:
        key = self._keys.take()
        headers = self._with_key[key] if key is not None else self._headers
        response = await self._request("GET", URL(f"{self._base_url}/models"), headers, None)
        try:
            if response.status != 200:
                raise await self._rejection(response, key)
            body = await _read_whole(response)
        finally:
            response.close()
        return read_models(body)

    async def is_well(self, path: str) -> bool:
        """Whether a GET of `path`, below the base URL, is answered with 200. Never raises."""
        key = self._keys.take()
        headers = self._with_key[key] if key is not None else self._headers
        try:
            response = await self._request("GET", URL(self._base_url + path), headers, None)
        except UpstreamError:
            return False
        response.close()
        return response.status == 200

    def note(self, key: str | None, error: UpstreamError) -> None:
        """A key that is refused or limited rests; with another one the call may go again at once."""
        if isinstance(error, UpstreamMisconfigured):
            error.at_once = self._keys.rest(key, REFUSED_SECONDS)
        elif isinstance(error, UpstreamRateLimited):
            error.at_once = self._keys.rest(key, error.retry_after_seconds or LIMITED_SECONDS)

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
        except (aiohttp.ClientConnectorDNSError, UnicodeError):
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

    def _headers_with(self, key: str) -> CIMultiDict[str]:
        headers = CIMultiDict(self._headers)
        headers["Authorization"] = f"Bearer {key}"
        return headers

    async def _rejection(self, response: aiohttp.ClientResponse, key: str | None) -> UpstreamError:
        body = b""
        try:
            async with asyncio.timeout(ERROR_BODY_SECONDS):
                while len(body) < MAX_ERROR_BYTES and (more := await response.content.readany()):
                    body += more
        except (TimeoutError, aiohttp.ClientError, ConnectionError):
            pass  # the status says enough
        error = rejection(
            response.status,
            body,
            retry_after=response.headers.get("Retry-After"),
            request_id=clean_request_id(response.headers.get(REQUEST_ID_HEADER)),
            secret=key,
        )
        self.note(key, error)
        return error


class _Stream:
    """A StreamedAnswer over an aiohttp response; aiohttp stops reading while nobody calls `read`."""

    def __init__(self, response: aiohttp.ClientResponse, secret: str | None) -> None:
        self.secret = secret
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
