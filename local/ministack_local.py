"""MiniStack, the emulator of AWS, with what it lacks. Its settings come from the environment.

Usage: GATEWAY_PORT=4566 python ministack_local.py
"""

import connections
import dynamic_thing_groups
import enforcement
import event_source_batches
import filter_patterns
import iot_endpoint
import job_events
import job_retries
import job_timeouts
import job_transitions
import message_moves
import metering
import ministack.services.lambda_svc as lambda_svc
import schedule_times
import session_tokens
import strict_values
import thing_versions
import topic_decoding
from ministack.app import main

_sqs_esm_concurrency = lambda_svc._sqs_esm_concurrency


def sqs_concurrency(mapping, *arguments, **keywords):
    """Gap: CloudFormation makes a number of a parameter where a property is one; the emulator leaves the text."""
    scaling = mapping.get("ScalingConfig") or {}
    if scaling.get("MaximumConcurrency"):
        mapping["ScalingConfig"] = {**scaling, "MaximumConcurrency": int(scaling["MaximumConcurrency"])}
    return _sqs_esm_concurrency(mapping, *arguments, **keywords)


lambda_svc._sqs_esm_concurrency = sqs_concurrency
connections.install()
dynamic_thing_groups.install()
enforcement.install()
event_source_batches.install()
filter_patterns.install()
iot_endpoint.install()
job_events.install()
job_retries.install()
job_timeouts.install()
job_transitions.install()
message_moves.install()
metering.install()
schedule_times.install()
session_tokens.install()
strict_values.install()
thing_versions.install()
topic_decoding.install()

if __name__ == "__main__":
    main()
