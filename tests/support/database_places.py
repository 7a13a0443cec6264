"""Where the store of a test's folder is: in a file of it, or in PostgreSQL."""

from pathlib import Path

_URL_FILE = "postgres-url"


def location_in(folder: Path) -> str | Path:
    """What `Store.open` opens for this folder."""
    url = folder / _URL_FILE
    return url.read_text() if url.exists() else folder / "dashboard.sqlite"


def put_in_postgres(folder: Path, url: str) -> None:
    """Have the store of this folder be in PostgreSQL."""
    (folder / _URL_FILE).write_text(url)
