"""Which code runs here. No torch in here."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from gpt2core import __version__
from gpt2core.records import CodeVersion

GIT_TIMEOUT_S = 10.0


@functools.cache
def code_version(package: Path = Path(__file__).parent) -> CodeVersion:
    """The package's version and, when its folder belongs to a git checkout, the commit and whether files differ from it."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:  # a checkout around it is another project's
        return CodeVersion(version=__version__)
    described = _git(package, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty")
    if described is None:
        return CodeVersion(version=__version__)
    return CodeVersion(version=__version__, commit=described.removesuffix("-dirty"), dirty=described.endswith("-dirty"))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers, None when it is not there or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
