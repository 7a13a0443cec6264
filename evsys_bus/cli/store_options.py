"""Options for the store of checkpoints, and opening it."""

import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from evsys_bus.errors import BrokenAdapterError

if TYPE_CHECKING:
    from evsys_adapters.checkpoints.destination import Destination
    from evsys_adapters.checkpoints.stores import StoreOptions

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])


def store_options(command: _CommandT) -> _CommandT:
    """Add ``--from`` (argument ``url``) and the connection options (argument ``options``) to a command."""

    @functools.wraps(command)
    def with_store_options(
        *args: Any, endpoint: str | None, region: str | None, path_style: bool | None, profile: str | None, **rest: Any
    ) -> object:
        from evsys_adapters.checkpoints.stores import StoreOptions

        return command(*args, reach=StoreOptions(endpoint, region, path_style, profile), **rest)

    wrapped: Callable[..., Any] = with_store_options
    for option in (
        click.option("--profile", metavar="NAME", help="The profile of the AWS configuration with the credentials."),
        click.option(
            "--path-style/--host-style",
            default=None,
            help="Address the bucket by path or by host.",
        ),
        click.option("--region", metavar="NAME", help="The region of the bucket."),
        click.option("--endpoint", metavar="URL", help="The URL of an S3-compatible server other than Amazon's."),
        click.option("--from", "url", metavar="URL", help="Where to look: s3://bucket/prefix or file:///folder."),
    ):
        wrapped = option(wrapped)
    return cast("_CommandT", wrapped)


@asynccontextmanager
async def open_store(url: str, options: "StoreOptions") -> "AsyncGenerator[Callable[[str], Destination]]":
    """Open the store at this URL within the block; yields a function from a run to its destination. Read-only.

    Raises:
        ConfigError, DeliveryError, OSError: The store raised it.
        BrokenAdapterError: The client library of the store is not installed.
    """
    from evsys_adapters.checkpoints.destination import Destination
    from evsys_adapters.checkpoints.manifest import component
    from evsys_adapters.checkpoints.stores import StorePool

    pool = StorePool(options)
    try:
        try:
            opened = await pool.get(url, probe=False)
        except ModuleNotFoundError as error:
            fix = "pip install 'evsys-bus[s3]'   or   uv add 'evsys-bus[s3]'"
            what = f"{url} cannot be reached from here"
            raise BrokenAdapterError(what, why=f"{error.name} is not installed", fix=fix) from error
        yield lambda run: Destination(opened.store, opened.prefix, component(run))
    finally:
        await pool.close()


@asynccontextmanager
async def open_destination(url: str, options: "StoreOptions", run: str) -> "AsyncGenerator[Destination]":
    """Open the destination of one run at this URL within the block; raises what `open_store` does."""
    async with open_store(url, options) as destination_of:
        yield destination_of(run)
