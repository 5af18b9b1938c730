"""What can go wrong, as a person should read it.

AudienceSyncError
├── ConfigError          the configuration, the command line or a credential
│   └── MissingVariable  an environment variable that the configuration names is not set
├── DefinitionError      a definition cannot be computed as it is written
├── DatabaseError        our own database cannot be used
├── SourceError          a source cannot be reached or read
├── CallError            a call that is not valid
├── NotApproved          a held run that must be computed again first
├── NotForgotten         Userpilot did not take a deletion
├── Busy                 another process is syncing the definition
└── LeaseLost            another process took this one's place; nothing was written

Interrupted              a signal asked this process to stop

A message says what happened, where, and what to do next. It never holds a secret.
"""


class AudienceSyncError(Exception):
    exit_code = 1


class ConfigError(AudienceSyncError):
    exit_code = 2


class MissingVariable(ConfigError):  # noqa: N818  (reads as what happened)
    pass


class DefinitionError(AudienceSyncError):
    pass


class DatabaseError(AudienceSyncError):
    exit_code = 2


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
