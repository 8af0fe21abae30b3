"""HTTP frameworks that could carry the REST API: python -m benchmarks.http_race, with tornado, uvicorn and httptools.

Each answers a POST with the length of its body; 8 connections that are kept ask for some seconds, with a small body and
with one of a megabyte, in turn. And it is tried what the API needs: chunked bodies, gzip, Expect: 100-continue.
"""

import gzip
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time

SERVERS = {
    "aiohttp": """
import asyncio
from aiohttp import web
async def main(port):
    async def answer(request):
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
            request.writer.output_size = 0
        return web.Response(body=str(len(await request.read())).encode())
    def made(message, payload, protocol, writer, task):
        loop = asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=2**40)
    server = web.Server(answer, request_factory=made, access_log=None)
    await asyncio.get_running_loop().create_server(server, "127.0.0.1", port)
    await asyncio.sleep(3600)
asyncio.run(main(PORT))
""",
    "tornado": """
import asyncio
from tornado.httpserver import HTTPServer
async def main(port):
    def answer(request):
        body = str(len(request.body)).encode()
        request.connection.write_headers(
            __import__("tornado.httputil").httputil.ResponseStartLine("HTTP/1.1", 200, "OK"),
            __import__("tornado.httputil").httputil.HTTPHeaders({"Content-Length": str(len(body))}), body)
        request.connection.finish()
    server = HTTPServer(answer, decompress_request=True, max_body_size=2**40, max_buffer_size=2**40)
    server.listen(port, "127.0.0.1")
    await asyncio.sleep(3600)
asyncio.run(main(PORT))
""",
    "uvicorn, httptools": """
import uvicorn
async def answer(scope, receive, send):
    if scope["type"] != "http":
        return
    parts, more = [], True
    while more:
        event = await receive()
        parts.append(event.get("body", b""))
        more = event.get("more_body", False)
    body = str(len(b"".join(parts))).encode()
    length = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": body})
uvicorn.run(answer, host="127.0.0.1", port=PORT, http="httptools", loop="asyncio", log_level="critical")
""",
}  # fmt: skip


def rate(port: int, body: bytes, seconds: float, clients: int = 8) -> float:
    counts = [0] * clients
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.perf_counter() < end:
            connection.request("POST", "/", body)
            if connection.getresponse().read() != str(len(body)).encode():
                raise ValueError("another answer")
            counts[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(clients)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - begun)


def able(port: int) -> list[str]:
    """What of the API's needs a server meets."""
    found = []
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    packed = gzip.compress(b"x" * 1000)
    tries = {
        "chunked": (head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"\r\n\r\n3"),
        "gzip": (
            head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed,
            b"\r\n\r\n1000",
        ),
        "Expect": (head + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n", b"HTTP/1.1 100"),
    }
    for name, (sent, wanted) in tries.items():
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(sent)
            try:
                data = connection.recv(4096)
                while wanted not in data and (more := connection.recv(4096)):
                    data += more
            except TimeoutError:
                data = b""
            if wanted in data:
                found.append(name)
    return found


def main(seconds: float = 2.0, rounds: int = 3) -> None:
    from shared.launch import free_ports

    small = json.dumps({"instances": [[1.0, 2.0, 3.0]]}).encode()
    bodies = {"small": small, "1 MB": b"x" * 1_000_000}
    ports = dict(zip(SERVERS, free_ports(len(SERVERS)), strict=True))
    processes = [subprocess.Popen([sys.executable, "-c", code.replace("PORT", str(ports[name]))])
                 for name, code in SERVERS.items()]  # fmt: skip
    try:
        time.sleep(3)
        rates = {name: {kind: [] for kind in bodies} for name in SERVERS}
        for _ in range(rounds):
            for name, port in ports.items():
                for kind, body in bodies.items():
                    rates[name][kind].append(rate(port, body, seconds))
        for name, port in ports.items():
            told = ", ".join(f"{kind} {statistics.median(values):,.0f}/s" for kind, values in rates[name].items())
            print(f"{name:<20} {told}; {', '.join(able(port)) or 'nothing of the rest'}", flush=True)
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    main()
