"""Gaps in event source mappings: from a queue the emulator takes ten messages at most and at once, where AWS gathers as many
as the mapping says for as long as it says; and it takes no notice of a stream's records that a function says have failed,
which AWS delivers again.
"""

import json
import time

import ministack.services.lambda_svc as lambda_svc
import ministack.services.sqs as sqs

AT_ONCE = 10

_receive = sqs._receive_messages_for_esm
_execute_function = lambda_svc._execute_function

# Since when messages wait in a queue for their batch to be full.
_waiting_since = {}


def window_of(queue):
    arn = queue["attributes"].get("QueueArn")
    windows = (
        int(mapping.get("MaximumBatchingWindowInSeconds") or 0)
        for _, _, mapping in lambda_svc._iter_all_esms()
        if mapping.get("EventSourceArn") == arn
    )
    return max(windows, default=0)


def is_due(queue_url, batch_size):
    """Whether a batch is full, or has been waited for long enough."""
    queue = sqs._get_q(queue_url)
    window = window_of(queue)
    if not window:
        return True
    now = time.time()
    waiting = sum(message["visible_at"] <= now for message in list(queue["messages"]))
    if not waiting:
        _waiting_since.pop(queue_url, None)
        return False
    since = _waiting_since.setdefault(queue_url, now)
    return waiting >= batch_size or now - since >= window


def receive(queue_url, batch_size):
    batch_size = int(batch_size)
    if not is_due(queue_url, batch_size):
        return []
    _waiting_since.pop(queue_url, None)
    batch = []
    while len(batch) < batch_size:
        messages = _receive(queue_url, min(AT_ONCE, batch_size - len(batch)))
        batch += messages
        if len(messages) < AT_ONCE:
            break
    return batch


def execute_function(function, event, *arguments, **keywords):
    result = _execute_function(function, event, *arguments, **keywords)
    records = event.get("Records") if isinstance(event, dict) else None
    if records and records[0].get("eventSource") == "aws:dynamodb" and not result.get("error"):
        body = result.get("body")
        body = json.loads(body) if isinstance(body, (str, bytes)) else body
        if isinstance(body, dict) and body.get("batchItemFailures"):
            # The whole batch comes again, where AWS begins with the first of them.
            return {**result, "error": True}
    return result


def install():
    sqs._receive_messages_for_esm = receive
    lambda_svc._execute_function = execute_function
