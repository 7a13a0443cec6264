"""`HttpServer`: an HTTP server on loopback in the process of the test, which keeps every request."""

import gzip
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, bytes, dict[str, str]]


class Request(BaseHTTPRequestHandler):
    """A request, with its ``body`` as it was before compression."""

    server: "HttpServer"

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client was killed, or does not wait any longer
            super().handle()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        head = "\n".join([self.path, *(f"{name}: {value}" for name, value in self.headers.items())])
        self.server.received.append(head.encode() + b"\n" + self.body)
        reply = self.server.respond(self)
        if reply is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, data, headers = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 # names of the base class

    def log_message(self, *_: object) -> None:
        pass


class HttpServer(ThreadingHTTPServer):
    """Serves on threads from `start` to `stop`, or inside its block; subclasses define `respond`.

    Attributes:
        received: The path, the headers and the decompressed body of each request, as bytes.
    """

    daemon_threads = True

    def __init__(self, port: int = 0, request_class: type[Request] = Request) -> None:
        super().__init__(("127.0.0.1", port), request_class)
        self.received: list[bytes] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def respond(self, request: Request) -> Reply | None:
        """Return the status, the body and the headers of the reply, or None to cut the connection; on any thread."""
        raise NotImplementedError

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
