"""A bucket of our own."""

import pytest


@pytest.fixture(scope="session")
def bucket():
    """`s3://caches` on this machine."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    from scripts.loopback_s3 import serve_bucket, use

    with serve_bucket() as environment, use(environment | {"CASCACHE_COPY": ""}):
        yield "s3://caches"
