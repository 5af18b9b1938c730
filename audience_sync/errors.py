"""The errors that the program raises.

AudienceSyncError
├── ConfigError          the configuration, the command line or a credential
│   └── MissingVariable  an environment variable that the configuration names is not set
├── DefinitionError      a definition is not valid SQL for its database, or its result cannot be used
├── DatabaseError        our own database cannot be used
│   └── DatabaseLocked   another transaction holds a lock for too long
├── SourceError          a source cannot be reached or read
├── CallError            a call that is not valid
├── NotApproved          a held run can no longer be committed: compute it again
├── NotForgotten         Userpilot refused a deletion or did not answer
├── Busy                 another process is syncing the definition
└── LeaseLost            another process took over the lease; this one has written nothing

Interrupted              a signal asked this process to stop (a BaseException)

A message says what happened, where, and what to do next, and never contains a secret. A command that ends with an
error exits with the error's `exit_code`.
"""

import traceback
from pathlib import Path


class AudienceSyncError(Exception):
    exit_code = 1


def unexpected(error: Exception) -> str:
    """Describe an unexpected error by its type and place, for a report: its message may contain a user's data."""
    name = f"{type(error).__module__}.{type(error).__name__}".removeprefix("builtins.")
    frames = traceback.extract_tb(error.__traceback__)
    return f"{name} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else name


class ConfigError(AudienceSyncError):
    exit_code = 2


class MissingVariable(ConfigError):  # noqa: N818  (named for what happened)
    pass


class DefinitionError(AudienceSyncError):
    pass


class DatabaseError(AudienceSyncError):
    exit_code = 2


class DatabaseLocked(DatabaseError):  # noqa: N818
    pass


class SourceError(AudienceSyncError):
    pass


class CallError(AudienceSyncError):
    exit_code = 2


class NotApproved(AudienceSyncError):  # noqa: N818
    pass


class NotForgotten(AudienceSyncError):  # noqa: N818
    pass


class Busy(AudienceSyncError):  # noqa: N818
    exit_code = 75


class LeaseLost(AudienceSyncError):  # noqa: N818
    pass


class Interrupted(BaseException):
    exit_code = 1
