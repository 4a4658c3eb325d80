"""Creates a job and prints as JSON when each of its executions began and ended, in seconds after that, and how long further replies
of a device take to find their operation.

The AWS CLI needs most of a second to start, which would be part of each time.

Usage: AWS_ENDPOINT_URL=… AWS_ENDPOINT_URL_SFN=… python time_upgrades.py --create-job NAME --handle-response NAME
    --payload FILE --state-machine ARN --devices N --thing NAME
"""

import argparse
import base64
import json
import statistics
import sys
import time

import boto3
from botocore.config import Config

INTERVAL = 2
INVOCATIONS = 20
# So many that the invocation itself, slow in the local cloud, does not count.
REPLIES = 100


def invoke(function, payload):
    """What the function answers."""
    client = boto3.client("lambda", config=Config(read_timeout=120, retries={"total_max_attempts": 1}))
    answer = client.invoke(FunctionName=function, Payload=payload)
    body = answer["Payload"].read()
    if "FunctionError" in answer:
        sys.exit(f"{function} failed: {body.decode()}")
    return json.loads(body)


def executions(state_machine, job, devices, limit):
    """The job's executions when all devices' have ended."""
    client = boto3.client("stepfunctions")
    end, shown = time.time() + limit, None
    while True:
        pages = client.get_paginator("list_executions").paginate(stateMachineArn=state_machine)
        ours = [execution for page in pages for execution in page["executions"] if execution["name"].startswith(job)]
        ended = [execution for execution in ours if execution["status"] != "RUNNING"]
        if len(ended) != shown:
            shown = len(ended)
            print(f"  {shown} of {devices} executions have ended", file=sys.stderr)
        if len(ended) >= devices:
            return ended
        if time.time() > end:
            sys.exit(f"{len(ended)} of {devices} executions have ended after {limit} s, and {len(ours)} have begun")
        time.sleep(INTERVAL)


def lookup(function, thing, operation):
    """The median time of the function for a reply that has come before, in milliseconds."""
    reply = {"operationId": operation, "name": "DOWNLOAD_STARTED", "type": "RESP", "status": "SUCCESS", "timestamp": 1}
    topic = f"devices/{thing}/firmware_resp"
    body = json.dumps({"topic": topic, "payload": base64.b64encode(json.dumps(reply).encode()).decode()})
    records = [
        {"messageId": str(number), "body": body, "eventSource": "aws:sqs", "eventSourceARN": "arn:aws:sqs:::bench"}
        for number in range(REPLIES)
    ]
    client = boto3.client("lambda")
    times = []
    for _ in range(INVOCATIONS):
        begin = time.perf_counter()
        answer = client.invoke(FunctionName=function, Payload=json.dumps({"Records": records}))
        answered = json.loads(answer["Payload"].read())
        times.append(time.perf_counter() - begin)
        if "FunctionError" in answer or answered.get("batchItemFailures"):
            sys.exit(f"{function} failed: {answered}")
    return statistics.median(times) * 1000 / REPLIES


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("create-job", "handle-response", "payload", "state-machine", "thing"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--devices", required=True, type=int)
    parser.add_argument("--limit", type=int, default=1800, help="seconds")
    options = parser.parse_args()
    with open(options.payload, encoding="utf-8") as file:
        payload = file.read()
    begin = time.time()
    job = invoke(options.create_job, payload)["jobId"]
    ended = executions(options.state_machine, job, options.devices, options.limit)
    times = [
        {
            "status": execution["status"],
            "began": execution["startDate"].timestamp() - begin,
            "ended": execution["stopDate"].timestamp() - begin,
        }
        for execution in ended
    ]
    # Its operation is the first execution of its job.
    milliseconds = lookup(options.handle_response, options.thing, f"{job}-1")
    json.dump({"job": job, "executions": times, "lookupMilliseconds": milliseconds}, sys.stdout)


if __name__ == "__main__":
    main()
