"""On a schedule: flow runs that died where no automation saw it are given back to the workers."""

from __future__ import annotations

from prefect import flow
from pydantic import PositiveInt

from flows.automations import TAG
from tasks.reap_runs import reap_runs


@flow(name="reaper", flow_run_name="reaper")
def reaper(dead_for_s: PositiveInt = 120, max_crashes: PositiveInt = 5) -> list[str]:
    """Looks at all runs of the deployments tagged auto-resume; returns what was done, a line a run.

    Args:
        dead_for_s: Seconds that a run must be Crashed, or Running with no process on its folder, before it is touched.
        max_crashes: Crashes without Running in between after which a run is Failed instead.
    """
    return reap_runs(TAG, dead_for_s, max_crashes)
