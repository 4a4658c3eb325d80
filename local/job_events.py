"""Events of job executions as AWS sends them.

Gap: the emulator's say which of a job's executions on a thing they are about; AWS's name job and thing only. `deleted` is a topic
of theirs, but no status.
(https://docs.aws.amazon.com/iot/latest/developerguide/events-jobs.html)
"""

import ministack.services.iot as iot

_registry_event = iot._registry_event


def registry_event(config_type, topic, event_type, operation, fields, *arguments, **keywords):
    if config_type == "JOB_EXECUTION":
        lost = {"executionNumber"} | ({"status"} if operation == "deleted" else set())
        fields = {name: value for name, value in fields.items() if name not in lost}
    _registry_event(config_type, topic, event_type, operation, fields, *arguments, **keywords)


def install():
    """Makes the emulator say no more than AWS does."""
    iot._registry_event = registry_event
