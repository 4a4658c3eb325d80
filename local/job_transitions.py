"""Job executions that end without having begun, for the emulator, which lets them.

Gap: no document says whether AWS lets a job execution go from QUEUED to SUCCEEDED or FAILED. Here it refuses, so that what works
here works in both cases.
(https://docs.aws.amazon.com/iot/latest/apireference/API_iot-jobs-data_UpdateJobExecution.html)
"""

import ministack.services.iot as iot

_update_execution = iot.jobs_update_execution


def update_execution(thing_name, job_id, *, status, **keywords):
    execution = iot._job_executions.get((thing_name, job_id))
    if execution and execution["status"] == "QUEUED" and status in ("SUCCEEDED", "FAILED"):
        message = f"A job execution that is QUEUED cannot become {status}"
        return None, iot.error_response_json("InvalidStateTransitionException", message, 409)
    return _update_execution(thing_name, job_id, status=status, **keywords)


def install():
    """Makes the emulator as strict as AWS may be."""
    iot.jobs_update_execution = update_execution
