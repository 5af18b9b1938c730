"""Is a run so unlike the last one that a person should look first? Pure."""

from collections.abc import Mapping

from audience_sync.audiences.definition import Guard


def reason_to_hold(guard: Guard, last_count: int, counts: Mapping[str, int], *, is_empty: bool) -> str | None:
    """Why a run should wait, in words; None where it may go on.

    `last_count` is the size of the last snapshot, `counts` who entered, exited and changed; `is_empty`: the
    new snapshot has nobody, which counts as all exited. A first run is not to be asked about.
    """
    if last_count < guard.above:
        return None
    exited = last_count if is_empty else counts.get("exited", 0)
    entered = counts.get("entered", 0)
    if exited > guard.max_exit_ratio * last_count:
        left = "the snapshot is empty" if is_empty else f"{exited:,} of {last_count:,} members would leave"
        return f"{left}, and max_exit_ratio is {guard.max_exit_ratio:g}"
    if entered > guard.max_enter_ratio * last_count:
        return (
            f"{entered:,} users would enter beside {last_count:,} members, and max_enter_ratio is "
            f"{guard.max_enter_ratio:g}"
        )
    return None
