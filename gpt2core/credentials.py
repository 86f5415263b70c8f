"""Credentials are no part of a path or URL: those are kept in config.json and in Prefect's database, and are logged."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

# A password before the host (s3://key:secret@bucket), or a signature or token after the path. As JSON Schema has it, too.
IN_URL = (
    r"://[^/@]*:[^/@]*@"
    r"|[?&;]([Xx]-(Amz|Goog)-(Signature|Credential|Security-Token)|[Ss]ig(nature)?|[Tt]oken|[Aa]ccess_?(key|token)|[Ss]ecret|[Pp]assword)="
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


# Prefect checks a run's parameters by their JSON schema, before it stores them.
PathOrUrl = Annotated[
    str, AfterValidator(without_credentials), WithJsonSchema({"type": "string", "not": {"pattern": IN_URL}})
]
