"""Gap: EventBridge Scheduler fills in the time of a schedule (`<aws.scheduler.scheduled-time>`) where a target's input asks
for it (https://docs.aws.amazon.com/scheduler/latest/UserGuide/managing-schedule-context-attributes.html); the emulator
sends the words as they are.
"""

import datetime

import ministack.services.eventbridge as eventbridge

_invoke_target = eventbridge._invoke_target


def invoke_target(target, event, rule, *arguments, **keywords):
    if event.get("Source") == "aws.scheduler" and target.get("Input"):
        time = datetime.datetime.fromtimestamp(event["Time"], datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        target = {**target, "Input": target["Input"].replace("<aws.scheduler.scheduled-time>", time)}
    return _invoke_target(target, event, rule, *arguments, **keywords)


def install():
    eventbridge._invoke_target = invoke_target
