"""Who a process is: its name, for people; asked of psutil, which is only imported when asked."""

from __future__ import annotations


def name_of(pid: int, since: float) -> str:
    """The name of the process that had this pid at `since` (seconds since the epoch); empty if it
    is gone, or another process has its pid by now."""
    import psutil

    try:
        process = psutil.Process(pid) if pid else None
        if process is not None and process.create_time() <= since:
            return str(process.name())
    except psutil.Error:
        pass
    return ""
