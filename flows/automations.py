"""The server's part of recovery: automations that give a flow run whose process died back to the workers.

python -m flows.automations     makes what is missing, corrects what differs, and leaves the rest alone

An automation that is deleted and made anew forgets the runs that it watches, hence the care.
"""

from __future__ import annotations

from datetime import timedelta

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import PREFECT_API_URL

from gpt2core.flags import main_guard

TAG = "auto-resume"  # of the deployments whose runs are taken up again (prefect.yaml)
HEARTBEAT_S = 30  # PREFECT_FLOWS_HEARTBEAT_FREQUENCY of these deployments
SILENCE = timedelta(seconds=3 * HEARTBEAT_S)  # after which a process counts as dead
# Crashed is often reported twice, seconds apart: by the process that dies and by the worker that started it. A run that
# is given back at the first report would be marked Crashed by the second.
SETTLED = timedelta(seconds=20)


def _after(event: str, nothing_follows_within: timedelta) -> EventTrigger:
    """Fires for a tagged flow run when such an event was the last one heard of it for so long."""
    return EventTrigger(
        posture=Posture.Proactive,
        after={event},
        expect={"prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=ResourceSpecification(
            {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
        ),
        within=nothing_follows_within,
    )


AUTOMATIONS = [
    AutomationCore(
        name="gpt2-zombie",
        description=f"A run of a deployment tagged {TAG} whose heartbeats stopped is marked Crashed.",
        trigger=_after("prefect.flow-run.heartbeat", SILENCE),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"No heartbeat for {SILENCE.seconds} s: its process or machine died."
            )
        ],
    ),
    AutomationCore(
        name="gpt2-retry",
        description=f"A crashed run of a deployment tagged {TAG} waits for a worker again, and resumes there.",
        trigger=_after("prefect.flow-run.Crashed", SETTLED),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED, name="AwaitingRetry", message="Crashed: the next free worker resumes it."
            )
        ],
    ),
]


def ensure_automations() -> dict[str, str]:
    """Makes the server's automations what this file says; returns for each name what was done.

    Raises ValueError when no server is named, ConnectionError when it does not answer.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise ValueError(
            "PREFECT_API_URL is not set: give the address of the server, such as http://127.0.0.1:4200/api"
        )
    try:
        with get_client(sync_client=True) as client:
            return {wanted.name: _ensure(client, wanted) for wanted in AUTOMATIONS}
    except httpx.HTTPError as error:
        raise ConnectionError(f"{url} does not do what it was asked ({type(error).__name__}: {error})") from None


def _ensure(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    found = client.read_automations_by_name(wanted.name)
    for twin in found[1:]:  # two at once would act twice
        client.delete_automation(twin.id)
    if not found:
        client.create_automation(wanted)
        return "made"
    if _meaning(found[0]) == _meaning(wanted):
        return "left as it is" if found[0].enabled else "left as it is, switched off"
    client.update_automation(found[0].id, wanted.model_copy(update={"enabled": found[0].enabled}))
    return "corrected"


def _meaning(automation: AutomationCore) -> dict[str, object]:
    return automation.model_dump(include={"description", "trigger", "actions"})


def main() -> None:
    for name, done in ensure_automations().items():
        print(f"automation {name}: {done}")


if __name__ == "__main__":
    main_guard(main)
