"""Credentials are no part of a path or URL: those are kept in config.json and in Prefect's database, and are logged."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

# A password before the host (s3://key:secret@bucket), or a signature or token after the path. As JSON Schema has it, too.
IN_URL = (
    r"^[A-Za-z0-9+:]*[Hh][Tt][Tt][Pp][Ss]?://[^/@]*@"
    r"|://[^/@]*:[^/@]*@"
    r"|[?&;]([Xx]-([Aa]mz|[Gg]oog)-([Ss]ignature|[Cc]redential|[Ss]ecurity-[Tt]oken)|[Ss][Ii][Gg]([Nn][Aa][Tt][Uu][Rr][Ee])?"
    r"|([A-Za-z]*_?)?([Tt][Oo][Kk][Ee][Nn]|[Kk][Ee][Yy]|[Ss][Ee][Cc][Rr][Ee][Tt]|[Pp][Aa][Ss][Ss][Ww][Oo][Rr][Dd]))="
)


def without_credentials(location: str) -> str:
    """The location itself. Raises ValueError, which does not repeat it, when a credential is in it."""
    if re.search(IN_URL, location):
        scheme = location.partition("://")[0]
        raise ValueError(
            f"this {scheme} URL holds a password, key or token, which would be stored with the run and shown in logs: leave "
            f"it out, and give it through the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or fsspec's "
            f"configuration files"
        )
    return location


def local_folder(location: str) -> str:
    """The location itself. Raises ValueError, which does not repeat it, for a URL."""
    if "://" in location:
        raise ValueError(
            "runs have their folders on a local or mounted file system, and this is a URL; "
            "checkpoints alone may lie at one: checkpoint_dir"
        )
    return location


# Prefect checks a run's parameters by their JSON schema, before it stores them.
PathOrUrl = Annotated[
    str, AfterValidator(without_credentials), WithJsonSchema({"type": "string", "not": {"pattern": IN_URL}})
]
LocalFolder = Annotated[
    str, AfterValidator(local_folder), WithJsonSchema({"type": "string", "not": {"pattern": "://"}})
]
