"""An S3 server on this machine, for tests and benchmarks: moto's, in a process or thread of its own."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from common.errors import ConfigError

_SIGNED: Final = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"


@contextmanager
def serve_bucket(name: str = "caches") -> Iterator[dict[str, str]]:
    """Serve one empty bucket until the block ends.

    Yields:
        What the environment has to hold so that `s3://<name>/...` leads to it, for this process and others.

    Raises:
        ConfigError: moto is not installed.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise ConfigError("an S3 server needs moto: pip install 'cascache[dev]'") from error
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        request = urllib.request.Request(f"http://{host}:{port}/{name}", method="PUT")
        request.add_header("Authorization", _SIGNED)
        urllib.request.urlopen(request).close()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextmanager
def use(environment: dict[str, str]) -> Iterator[None]:
    """Set environment variables until the block ends."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def serve_bucket_apart(name: str = "caches") -> Iterator[dict[str, str]]:
    """As `serve_bucket`, in a process of its own, so that it takes no time from this one's threads."""
    command = [sys.executable, "-m", "scripts.loopback_s3", name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        yield json.loads(server.stdout.readline())
        server.terminate()


if __name__ == "__main__":
    with serve_bucket(sys.argv[1]) as environment:
        print(json.dumps(environment), flush=True)
        sys.stdin.read()
