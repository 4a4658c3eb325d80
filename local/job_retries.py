"""Retries of job executions for the emulator, which keeps a job's retry configuration and does nothing with it.

Gap: on AWS a job execution that has failed or timed out is followed by a new one, as long as the configuration has retries
left; a thing that has left the target and joined it again begins with all of them. Whether AWS announces a retry on `notify-next`
no document settles ("when the next job has changed", and a retry is of the same job), so here it does not.
(https://docs.aws.amazon.com/iot/latest/developerguide/jobs-configuration-details.html)
"""

import ministack.services.iot as iot

_jobs_maybe_complete = iot._jobs_maybe_complete


def has_retry(job, execution):
    criteria = (job.get("jobExecutionsRetryConfig") or {}).get("criteriaList") or []
    failures = (execution["status"], "ALL")
    allowed = [one["numberOfRetries"] for one in criteria if one.get("failureType") in failures]
    return (
        execution["status"] in ("FAILED", "TIMED_OUT")
        and execution.get("retryAttempt", 0) < max(allowed, default=0)
        and execution["thingName"] in iot._job_target_things(job.get("targets"))
    )


def maybe_complete(job_id):
    """Called whenever an execution has ended."""
    job = iot._jobs.get(job_id)
    if job and job.get("status") == "IN_PROGRESS" and job.get("jobExecutionsRetryConfig"):
        for execution in [one for one in iot._job_executions.values() if one["jobId"] == job_id]:
            if has_retry(job, execution):
                iot._jobs_queue_execution(execution["thingName"], job_id, iot._jobs_now_ms())
                retry = iot._job_executions[(execution["thingName"], job_id)]
                retry["retryAttempt"] = execution.get("retryAttempt", 0) + 1
    _jobs_maybe_complete(job_id)


def install():
    """Makes the emulator try again."""
    iot._jobs_maybe_complete = maybe_complete
