"""Prints the executions of a state machine as a JSON array, each as DescribeExecution shows it, with times in seconds.

The AWS CLI describes one execution a start, which takes most of a second: too long for a fleet.

Usage: AWS_ENDPOINT_URL_SFN=http://127.0.0.1:4567 python list_executions.py --state-machine ARN
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import boto3

PARALLEL_CALLS = 8


def descriptions(state_machine):
    """The descriptions of all executions, the latest first."""
    client = boto3.client("stepfunctions")
    pages = client.get_paginator("list_executions").paginate(stateMachineArn=state_machine)
    arns = [execution["executionArn"] for page in pages for execution in page["executions"]]
    with ThreadPoolExecutor(PARALLEL_CALLS) as pool:
        return list(pool.map(lambda arn: client.describe_execution(executionArn=arn), arns))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-machine", required=True, help="ARN of the state machine")
    executions = descriptions(parser.parse_args().state_machine)
    json.dump(executions, sys.stdout, default=datetime.timestamp)


if __name__ == "__main__":
    main()
