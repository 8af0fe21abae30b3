"""Servers of tf.data's service, which make training batches on other machines: a dispatcher, and workers.

A training sends the dispatcher the graph of its input pipeline, with the arrays in it; each worker asks the dispatcher
for the next step that nobody makes yet, and the training reads the finished batches from the workers
(`shared/training/service.py`). TensorFlow has no setting for the interface that they listen on, and no
encryption: they listen on all, and run any graph that they are sent.
"""

import os
import signal
import socket
import threading

import grpc
import tensorflow as tf
from google.protobuf import descriptor_pb2

from shared.run import say

service = tf.data.experimental.service
WAIT = 5.0  # seconds that a dispatcher or a worker may take to answer


def serve(*, host: str, port: int, workers: int, worker_port: int, dispatcher: str) -> None:
    """Run the servers until SIGTERM or Ctrl-C, which end the process with exit code 0.

    Args:
        host: name or address by which trainings and the other servers reach this machine.
        port: of the dispatcher; 0: any free one.
        workers: to run in this process.
        worker_port: of the first worker, the others on the ports after it; 0: any free ones.
        dispatcher: HOST:PORT of one elsewhere that the workers join; empty: it runs here too.

    Raises:
        ValueError: that is no address of a dispatcher.
        ConnectionError: there is no dispatcher to join.
        OSError: a port is not free.
    """
    ended = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: ended.set())
    servers = []
    if dispatcher:
        dispatcher = dispatcher.removeprefix("grpc://")
        registered(f"grpc://{dispatcher}")
        target = dispatcher
    else:
        servers.append(_started(service.DispatchServer, service.DispatcherConfig(port=port)))
        target = f"{host}:{servers[0].target.rpartition(':')[2]}"
        dispatcher = f"127.0.0.1:{servers[0].target.rpartition(':')[2]}"
    for number in range(workers):
        config = service.WorkerConfig(
            dispatcher_address=dispatcher,
            worker_address=f"{host}:%port%",
            port=worker_port + number if worker_port else 0,
            heartbeat_interval_ms=1000,  # how soon it hears of a training that began
        )
        servers.append(_started(service.WorkerServer, config))
    many = "1 worker makes" if workers == 1 else f"{workers} workers make"
    say("service", f"{many} batches for --data-service=grpc://{target}")
    ended.wait()
    os._exit(0)  # there is nothing to save, and TensorFlow's servers end only after those that they talk to


def _started(kind: type, config):
    try:
        if config.port:  # where gRPC would share the port with another server
            socket.create_server(("", config.port)).close()
        return kind(config)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot listen on port {config.port}: {error}; give another --port or --worker-port") from error


def registered(address: str) -> list[str]:
    """HOST:PORT of each worker of a data service; ConnectionError where none answers, ValueError for no address."""
    scheme, _, target = address.partition("://")
    host, _, port = target.rpartition(":")
    if scheme != "grpc" or not host or not port.isdigit():
        raise ValueError(f"{address} is no address of a data service; give grpc://HOST:PORT, as it prints it")
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = channel.unary_unary("/tensorflow.data.DispatcherService/GetWorkers")(b"", timeout=WAIT)
        except grpc.RpcError as error:
            raise ConnectionError(
                f"no data service answers at {address} ({error.details() or error.code().name}); is `cornucopia "
                f"data-service` running there, with this --port?"
            ) from None
    # TensorFlow's Python package lacks this reply's type. It is messages that begin with a text, as are these.
    return [worker.name for worker in descriptor_pb2.FileDescriptorSet.FromString(reply).file]


def check(address: str) -> None:
    """See that a data service answers, and that a worker of it can be reached from here; it names lost ones for ever.

    Raises:
        ValueError: that is no address.
        ConnectionError: no service answers there, it has no workers, or none can be reached.
    """
    workers = registered(address)
    if not workers:
        raise ConnectionError(f"the data service at {address} has no workers; start some: cornucopia data-service "
                              f"--dispatcher={address.removeprefix('grpc://')}")  # fmt: skip
    if not any(_answers(worker) for worker in workers):
        raise ConnectionError(
            f"no worker of the data service at {address} can be reached from here ({', '.join(workers)}); start them "
            f"with --host=NAME, a name of their machine that is known here"
        )


def _answers(worker: str) -> bool:
    host, _, port = worker.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=WAIT).close()
    except OSError:
        return False
    return True
