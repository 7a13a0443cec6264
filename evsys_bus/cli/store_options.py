"""Options that say where checkpoints are stored, and the way there."""

import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from evsys_bus.errors import BrokenAdapterError

if TYPE_CHECKING:
    from evsys_adapters.checkpoints.destination import Destination
    from evsys_adapters.checkpoints.places import Reach

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])  # Any: a command takes what its options say


def store_options(command: _CommandT) -> _CommandT:
    """``--from``, as ``url``, and how it is reached, as ``reach``."""

    @functools.wraps(command)
    def with_reach(
        *args: Any, endpoint: str | None, region: str | None, path_style: bool | None, profile: str | None, **rest: Any
    ) -> object:
        from evsys_adapters.checkpoints.places import Reach

        return command(*args, reach=Reach(endpoint, region, path_style, profile), **rest)

    wrapped: Callable[..., Any] = with_reach
    for option in (
        click.option("--profile", metavar="NAME", help="Of the AWS configuration, whose credentials are used."),
        click.option("--path-style/--host-style", default=None, help="Where the bucket stands in a request."),
        click.option("--region", metavar="NAME", help="Of the bucket."),
        click.option("--endpoint", metavar="URL", help="Of a server that speaks S3, where it is not Amazon's."),
        click.option("--from", "url", metavar="URL", help="Where to look: s3://bucket/prefix or file:///folder."),
    ):
        wrapped = option(wrapped)
    return cast("_CommandT", wrapped)


@asynccontextmanager
async def at_store(url: str, reach: "Reach") -> "AsyncGenerator[Callable[[str], Destination]]":
    """What has each run's checkpoints at this URL, for as long as the block lasts; nothing is written there.

    Raises:
        ConfigError, DeliveryError, OSError: As a store does; BrokenAdapterError where its client is not installed.
    """
    from evsys_adapters.checkpoints.destination import Destination
    from evsys_adapters.checkpoints.manifest import component
    from evsys_adapters.checkpoints.places import Places

    places = Places(reach)
    try:
        try:
            place = await places.place(url, probe=False)
        except ModuleNotFoundError as error:
            fix = "pip install 'evsys-bus[s3]'   or   uv add 'evsys-bus[s3]'"
            what = f"{url} cannot be asked from here"
            raise BrokenAdapterError(what, why=f"{error.name} is not installed", fix=fix) from error
        yield lambda run: Destination(place.store, place.prefix, component(run))
    finally:
        await places.close()


@asynccontextmanager
async def at_destination(url: str, reach: "Reach", run: str) -> "AsyncGenerator[Destination]":
    """As `at_store`, for one run."""
    async with at_store(url, reach) as destination_of:
        yield destination_of(run)
