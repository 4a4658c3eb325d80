"""Prints the executions of a state machine as a JSON array: name, status, seconds, and its state transitions as AWS counts
them: the entry into each state, and each further try of a task (https://aws.amazon.com/step-functions/pricing/).

Usage: AWS_ENDPOINT_URL_SFN=http://127.0.0.1:4567 python state_transitions.py --state-machine ARN
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import boto3

PARALLEL_CALLS = 8


def transitions(events):
    """Tasks are scheduled once for each try, and entered once for all of them."""
    kinds = [event["type"] for event in events]
    tries = kinds.count("TaskScheduled") + kinds.count("LambdaFunctionScheduled")
    return sum(kind.endswith("StateEntered") for kind in kinds) + max(0, tries - kinds.count("TaskStateEntered"))


def describe(client, arn):
    execution = client.describe_execution(executionArn=arn)
    pages = client.get_paginator("get_execution_history").paginate(executionArn=arn)
    events = [event for page in pages for event in page["events"]]
    stop = execution.get("stopDate")
    return {
        "name": execution["name"],
        "status": execution["status"],
        "seconds": (stop - execution["startDate"]).total_seconds() if stop else None,
        "transitions": transitions(events),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-machine", required=True, help="ARN of the state machine")
    client = boto3.client("stepfunctions")
    pages = client.get_paginator("list_executions").paginate(stateMachineArn=parser.parse_args().state_machine)
    arns = [execution["executionArn"] for page in pages for execution in page["executions"]]
    with ThreadPoolExecutor(PARALLEL_CALLS) as pool:
        json.dump(list(pool.map(lambda arn: describe(client, arn), arns)), sys.stdout)


if __name__ == "__main__":
    main()
