"""Lets devices connect all at once, and prints as JSON what became of their sessions.

The events are put into the queue of presence as the topic rule does it. The state machine is replaced by one of a single state: the
local interpreter runs some dozen executions a second, and what is measured is the way to their start.

Usage: AWS_ENDPOINT_URL=… AWS_ENDPOINT_URL_SFN=… python storm.py --queue URL --queue URL --state-machine ARN
    (the first queue is that of presence; the storm is over when all of them are empty)
"""

import argparse
import base64
import json
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import boto3

BATCH = 10
SENDERS = 8
INTERVAL = 0.5
# Several looks must find nothing, as a message is in no queue while it goes from one to the next.
QUIET_LOOKS = 6
COUNTS = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]


def replace_state_machine(state_machine):
    definition = {"StartAt": "Started", "States": {"Started": {"Type": "Succeed"}}}
    client = boto3.client("stepfunctions")
    client.update_state_machine(stateMachineArn=state_machine, definition=json.dumps(definition))


def register(things):
    """Only things that have a user get settings."""
    client = boto3.client("iot")
    attributes = {"attributes": {"externalId": "bench"}}
    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(lambda thing: client.create_thing(thingName=thing, attributePayload=attributes), things))


def event(thing, session):
    """A connection of that thing, as the topic rule puts it into the queue."""
    connected = {
        "clientId": thing,
        "timestamp": int(time.time() * 1000),
        "eventType": "connected",
        "sessionIdentifier": session,
        "principalIdentifier": "bench",
        "ipAddress": "127.0.0.1",
        "versionNumber": 0,
    }
    payload = base64.b64encode(json.dumps(connected).encode()).decode()
    return json.dumps({"topic": f"$aws/events/presence/connected/{thing}", "payload": payload})


def messages(sessions, repeats):
    """The things in the order of their events, and their sessions. The broker sends some events twice: the second comes in the next
    batch, which another invocation may have at the same time."""
    things = [f"storm-{number:05}" for number in range(sessions)]
    every = sessions // max(repeats, 1)
    order = []
    for index in range(sessions + BATCH):
        order.extend(things[index : index + 1])
        earlier = index - BATCH
        if repeats and earlier >= 0 and earlier % every == 0:
            order.append(things[earlier])
    return order, {thing: str(uuid.uuid4()) for thing in things}


def send(queue, order, ids, seconds):
    """Sends the events evenly over so many seconds; when each was sent first, and how long all took."""
    client = boto3.client("sqs")
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    begin, sent = time.time(), {}

    def one(index):
        due = begin + seconds * index / len(batches)
        time.sleep(max(0.0, due - time.time()))
        now = time.time()
        entries = [{"Id": str(at), "MessageBody": event(thing, ids[thing])} for at, thing in enumerate(batches[index])]
        failed = client.send_message_batch(QueueUrl=queue, Entries=entries).get("Failed")
        if failed:
            raise RuntimeError(f"events were not taken: {failed}")
        for thing in batches[index]:
            sent.setdefault(thing, now)

    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(one, range(len(batches))))
    return begin, sent, time.time() - begin


def drain(queues, limit):
    """Waits until the queues are empty; the most that was in them."""
    client = boto3.client("sqs")
    end, deepest, quiet = time.time() + limit, 0, 0
    while quiet < QUIET_LOOKS:
        if time.time() > end:
            sys.exit(f"the queues are not empty after {limit} s")
        answers = [client.get_queue_attributes(QueueUrl=queue, AttributeNames=COUNTS) for queue in queues]
        depth = sum(int(count) for answer in answers for count in answer["Attributes"].values())
        deepest, quiet = max(deepest, depth), 0 if depth else quiet + 1
        time.sleep(INTERVAL)
    return deepest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--queue", required=True, action="append", help="URL; the first takes the events")
    parser.add_argument("--state-machine", required=True, help="ARN")
    parser.add_argument("--sessions", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=500, help="how many events come twice")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--limit", type=int, default=900, help="seconds until the queues must be empty")
    options = parser.parse_args()
    replace_state_machine(options.state_machine)
    order, ids = messages(options.sessions, options.repeats)
    register(ids)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, options.queue[0], order, ids, options.seconds)
        time.sleep(min(1, options.seconds))
        deepest = drain(options.queue, options.limit)
        begin, sent, seconds = sending.result()
    pages = boto3.client("stepfunctions").get_paginator("list_executions").paginate(stateMachineArn=options.state_machine)
    executions = [execution for page in pages for execution in page["executions"]]
    # An execution's name begins with its thing's.
    starts = [(execution["name"][: len("storm-00000")], execution["startDate"].timestamp()) for execution in executions]
    started = Counter(thing for thing, _ in starts)
    json.dump(
        {
            "sessions": len(ids),
            "events": len(order),
            "seconds": seconds,
            "executions": len(starts),
            "twice": sum(count - 1 for count in started.values()),
            "lost": sum(thing not in started for thing in ids),
            "unknown": sum(thing not in ids for thing in started),
            "drained": max((start for _, start in starts), default=begin) - begin,
            "ages": sorted(start - sent[thing] for thing, start in starts if thing in sent),
            "deepest": deepest,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
