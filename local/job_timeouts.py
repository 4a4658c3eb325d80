"""Time-outs of job executions for the emulator, which notices them when somebody looks.

Gap: on AWS a job execution ends as TIMED_OUT when its time is over, with its event and with what follows for the thing's other
jobs; here only a read ended it, and told the thing nothing.
(https://docs.aws.amazon.com/iot/latest/developerguide/jobs-configuration-details.html)
"""

import asyncio

import ministack.services.iot as iot

SECONDS = 1

_apply_timeout = iot._jobs_apply_timeout
_scopes, _tasks = set(), set()


def first_pending(thing):
    """The job that is next for a thing, without ending anything."""
    pending = [
        one for one in iot._job_executions.values() if one["thingName"] == thing and one["status"] in ("QUEUED", "IN_PROGRESS")
    ]
    return min(pending, key=lambda one: one["queuedAt"])["jobId"] if pending else None


async def end_late_executions(account_id, region):
    """Ends what is over its time, and tells."""
    async with iot.publishing_events():
        with iot.request_scope(account_id, region):
            ended = []
            for execution in [one for one in iot._job_executions.values() if one["status"] == "IN_PROGRESS"]:
                previous = first_pending(execution["thingName"])
                if _apply_timeout(execution)["status"] == "TIMED_OUT":
                    ended.append((execution, previous))
        for execution, previous in ended:
            await iot.jobs_notify_thing(account_id, region, execution["thingName"], previous)
            await iot.jobs_abort_if_met(account_id, region, execution["jobId"])


async def watch():
    while True:
        await asyncio.sleep(SECONDS)
        for account_id, region in list(_scopes):
            try:
                await end_late_executions(account_id, region)
            except Exception as error:  # What is wrong with one job must not end the clock of all.
                print(f"job time-outs: {error!r}", flush=True)


def install():
    """Makes the emulator notice by itself."""
    handle = iot._route_request

    async def route_request(*arguments):
        _scopes.add((iot.get_account_id(), iot.get_region()))
        # Not before: the first request finds the event loop running.
        if not _tasks:
            _tasks.add(asyncio.get_running_loop().create_task(watch()))
        return await handle(*arguments)

    iot._jobs_apply_timeout = lambda execution: execution
    iot._route_request = route_request
