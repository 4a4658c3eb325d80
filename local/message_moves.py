"""Moves of dead letters back to where they come from, for the emulator, which has none.

Gap: StartMessageMoveTask and ListMessageMoveTasks. A task without a destination brings each message back to the queue whose redrive
policy has put it there; it fails at a message that was sent to the dead-letter queue itself. On AWS it goes on after the answer.
(https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_StartMessageMoveTask.html)
"""

import time
import uuid

import ministack.services.sqs as sqs

# All tasks, the newest first.
_tasks = []


def dead_letters(data):
    queue = sqs._queue_by_arn(data.get("SourceArn", ""))
    if queue is None:
        raise sqs._Err("ResourceNotFoundException", "The resource that you specified for the SourceArn parameter doesn't exist.")
    return queue


def move(message):
    """Puts a message back, and says whether its queue is known."""
    source = sqs._queue_by_arn(message["sys"].pop("DeadLetterQueueSourceArn", ""))
    if source is None:
        return False
    now = time.time()
    source["messages"].append(
        {**message, "receive_count": 0, "receipt_handle": None, "first_receive_at": None, "sent_at": now, "visible_at": now}
    )
    sqs.esm_wake.set()
    return True


def start_message_move_task(data, _url):
    queue = dead_letters(data)
    if data.get("DestinationArn"):
        raise sqs._Err("UnsupportedOperation", "The local cloud moves messages only to where they come from.")
    total = len(queue["messages"])
    while queue["messages"] and move(queue["messages"][0]):
        del queue["messages"][0]
    rest = len(queue["messages"])
    task = {
        "Status": "FAILED" if rest else "COMPLETED",
        "SourceArn": data["SourceArn"],
        "ApproximateNumberOfMessagesMoved": total - rest,
        "ApproximateNumberOfMessagesToMove": total,
        "StartedTimestamp": int(time.time() * 1000),
    }
    _tasks.insert(0, {**task, "FailureReason": "CouldNotDetermineMessageSource"} if rest else task)
    return {"TaskHandle": str(uuid.uuid4())}


def list_message_move_tasks(data, _url):
    dead_letters(data)
    found = [task for task in _tasks if task["SourceArn"] == data["SourceArn"]]
    return {"Results": found[: data.get("MaxResults", 1)]}


def install():
    """Gives the emulator both calls."""
    sqs._HANDLERS["StartMessageMoveTask"] = start_message_move_task
    sqs._HANDLERS["ListMessageMoveTasks"] = list_message_move_tasks
