"""The command line's HTTP client to the node that runs on this machine. Blocking, and small."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any

#: Seconds for a question that the node answers from memory.
QUICK = 10.0
#: A whole answer has at most some hundred kB; lists of thousands of answers are larger.
MAX_BODY = 64 << 20
MAX_LINE = 8 << 20
#: The header that names a request to a model.
REQUEST_ID = "x-promptmesh-request-id"


class NodeError(Exception):
    """The node could not be asked, or could not answer. The message is a whole sentence."""

    #: Names a request to a model that failed, for `explain`; "": it is not known.
    request_id = ""


class NodeNotRunning(NodeError):
    """Nothing listens where the node should be."""


class NodeRefused(NodeError):
    """The node answered with an error. `status` is that of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NodeClient:
    """Asks the node at `address` (HOST:PORT). Each call has a connection of its own."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, *, timeout: float = QUICK) -> Any:
        """The JSON at that path. Raises `NodeError`."""
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: object = None, *, timeout: float = QUICK) -> Any:
        """The JSON of the answer. Raises `NodeError`."""
        return self._ask("POST", path, {} if body is None else body, timeout)

    def ask(self, method: str, path: str, body: object = None, *, timeout: float = QUICK) -> bytes:
        """The body of the answer as it came. Raises `NodeError`."""
        return self._body(method, path, body, timeout)

    def stream(self, path: str, body: object, *, timeout: float) -> EventStream:
        """Begin a streamed answer. `timeout` (s) is for each piece. Raises `NodeError`."""
        connection, response = self._request("POST", path, body, timeout)
        return EventStream(connection, response, self.address)

    def _ask(self, method: str, path: str, body: object, timeout: float) -> Any:
        data = self._body(method, path, body, timeout)
        return _decoded(data, self.address) if data else None

    def _body(self, method: str, path: str, body: object, timeout: float) -> bytes:
        connection, response = self._request(method, path, body, timeout)
        try:
            data = response.read(MAX_BODY + 1)
        except (OSError, http.client.HTTPException) as error:
            raise NodeError(f"the connection to the node broke: {_reason(error)}") from None
        finally:
            connection.close()
        if len(data) > MAX_BODY:
            raise NodeError(f"the node's answer to {path} is larger than {MAX_BODY >> 20} MB")
        return data

    def _request(
        self, method: str, path: str, body: object, timeout: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send it, and read the answer's head. The caller closes the connection."""
        connection = http.client.HTTPConnection(self.address, timeout=timeout)
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if data else {}
        try:
            try:
                connection.connect()
            except OSError as error:
                raise NodeNotRunning(
                    f"the node does not answer at {self.address}: {_reason(error)}"
                ) from None
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            if response.status >= 400:
                message = error_message(response.read(MAX_BODY))
                refused = f"the node answered {response.status} {response.reason}"
                refusal = NodeRefused(message or refused, response.status)
                refusal.request_id = response.getheader(REQUEST_ID, "")
                raise refusal
        except TimeoutError:
            connection.close()
            raise NodeError(f"the node did not answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NodeError(f"the connection to the node broke: {_reason(error)}") from None
        except BaseException:
            connection.close()
            raise
        return connection, response


class EventStream:
    """The events of a streamed answer. Closing it before its end makes the node stop the work."""

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        address: str,
    ) -> None:
        self._connection = connection
        self._response = response
        self._address = address
        #: The answer's headers, with lower-case names.
        self.headers: Mapping[str, str] = {
            name.lower(): value for name, value in response.getheaders()
        }

        self.request_id = self.headers.get(REQUEST_ID, "")

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """The JSON object of each event, until `[DONE]`. Raises `NodeError`, also for a cut one."""
        try:
            yield from self._events()
        except NodeError as error:
            error.request_id = self.request_id
            raise

    def _events(self) -> Iterator[dict[str, Any]]:
        for data in self._data():
            if data == b"[DONE]":
                return
            event = _decoded(data, self._address)
            if not isinstance(event, dict):
                raise NodeError(f"what answers at {self._address} is not promptmesh")
            if "error" in event:
                raise NodeRefused(_message_in(event) or "the answer failed", 200)
            yield event
        raise NodeError("the answer broke off before its end")

    def _data(self) -> Iterator[bytes]:
        """What each event carries; one never has more than one line of it."""
        while line := self._line():
            name, _, value = line.rstrip(b"\r\n").partition(b":")
            if name == b"data":
                yield value.removeprefix(b" ")

    def _line(self) -> bytes:
        try:
            line = self._response.readline(MAX_LINE)
        except TimeoutError:
            raise NodeError("the node fell silent in the middle of the answer") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NodeError(f"the connection to the node broke: {_reason(error)}") from None
        if len(line) >= MAX_LINE:
            raise NodeError(f"the node sent a line of more than {MAX_LINE >> 20} MB")
        return line


def _decoded(data: bytes, address: str) -> Any:
    """JSON. Raises `NodeError` for anything else."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise NodeError(f"what answers at {address} is not promptmesh") from None


def error_message(body: bytes) -> str:
    """The sentence in an error's body; nothing if there is none."""
    try:
        return _message_in(json.loads(body))
    except (ValueError, RecursionError):
        return ""


def _message_in(value: Any) -> str:
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


def _reason(error: Exception) -> str:
    """Why, in the system's words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
