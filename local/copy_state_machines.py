"""Copies a stack's state machines from the emulator's Step Functions to the one that runs them here.

Gap: the emulator's own interpreter lacks heartbeats, calls to IoT, dynamic time-outs and idempotent names; moto's has
them, but CloudFormation deploys to the emulator. The definition in DescribeStateMachine has its placeholders filled in.

Usage: AWS_ENDPOINT_URL=http://127.0.0.1:4566 python copy_state_machines.py --stack NAME --to http://127.0.0.1:4567
"""

import argparse
import os

import boto3

TYPE = "AWS::StepFunctions::StateMachine"


def state_machines(stack):
    """The descriptions of all state machines that the stack owns."""
    source = boto3.client("stepfunctions", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    pages = boto3.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=stack)
    for page in pages:
        for resource in page["StackResourceSummaries"]:
            if resource["ResourceType"] == TYPE:
                yield source.describe_state_machine(stateMachineArn=resource["PhysicalResourceId"])


def copy(machine, target, existing):
    """Creates or updates the state machine under its name; says which."""
    same = {"definition": machine["definition"], "roleArn": machine["roleArn"]}
    if machine["stateMachineArn"] in existing:
        target.update_state_machine(stateMachineArn=machine["stateMachineArn"], **same)
        return "updated"
    created = target.create_state_machine(name=machine["name"], type=machine.get("type", "STANDARD"), **same)
    if created["stateMachineArn"] != machine["stateMachineArn"]:
        raise SystemExit(f"{machine['stateMachineArn']} became {created['stateMachineArn']}: account or Region differ")
    return "created"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stack", required=True, help="name of the deployed stack")
    parser.add_argument("--to", required=True, help="URL of the Step Functions that runs them")
    arguments = parser.parse_args()
    target = boto3.client("stepfunctions", endpoint_url=arguments.to)
    pages = target.get_paginator("list_state_machines").paginate()
    existing = {machine["stateMachineArn"] for page in pages for machine in page["stateMachines"]}
    for machine in state_machines(arguments.stack):
        print(f"{copy(machine, target, existing)} {machine['stateMachineArn']}")


if __name__ == "__main__":
    main()
