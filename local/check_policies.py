"""Checks the IAM policies of template.yaml as CloudFormation would get them: those that SAM makes of its policy templates too.

Policies of AWS IoT are of another language and stay out.

Usage: python check_policies.py [TEMPLATE]; exit code 1 when there is a finding.
"""

import json
import os
import re
import sys
import textwrap
from pathlib import Path

import parliament
from samtranslator.translator.transform import transform
from samtranslator.yaml_helper import yaml_parse

REGION, ACCOUNT = "eu-west-1", "111122223333"
PSEUDO_PARAMETERS = {
    "AWS::Partition": "aws",
    "AWS::Region": REGION,
    "AWS::AccountId": ACCOUNT,
    "AWS::StackName": "stack",
    "AWS::URLSuffix": "amazonaws.com",
}
# What a resource's ARN looks like, and the types whose `Ref` is their ARN.
ARNS = {
    "AWS::DynamoDB::Table": f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{{}}",
    "AWS::Events::Rule": f"arn:aws:events:{REGION}:{ACCOUNT}:rule/{{}}",
    "AWS::IoT::JobTemplate": f"arn:aws:iot:{REGION}:{ACCOUNT}:jobtemplate/{{}}",
    "AWS::IoT::ThingGroup": f"arn:aws:iot:{REGION}:{ACCOUNT}:thinggroup/{{}}",
    "AWS::Lambda::Function": f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{{}}",
    "AWS::Logs::LogGroup": f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:{{}}:*",
    "AWS::S3::Bucket": "arn:aws:s3:::{}",
    "AWS::SNS::Topic": f"arn:aws:sns:{REGION}:{ACCOUNT}:{{}}",
    "AWS::SQS::Queue": f"arn:aws:sqs:{REGION}:{ACCOUNT}:{{}}",
    "AWS::StepFunctions::StateMachine": f"arn:aws:states:{REGION}:{ACCOUNT}:stateMachine:{{}}",
}
REF_IS_ARN = ("AWS::SNS::Topic", "AWS::StepFunctions::StateMachine")
# Parameters whose default is empty.
PARAMETERS = {
    "SettingsApiKeySecretArn": f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:key-AbCdEf",
    "SettingsApiKmsKeyArn": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/11111111-2222-3333-4444-555555555555",
}

# The findings that stand all the same, each with its reason.
BATCH = "of SAM's SQSPollerPolicy; it allows nothing, for batches are checked as the actions without `Batch`"
TASK = "is checked on the ARN of the state machine whose task it ends, although the reference lists no resource for it"
ACCEPTED = {
    ("UNKNOWN_ACTION", "sqs:ChangeMessageVisibilityBatch"): BATCH,
    ("UNKNOWN_ACTION", "sqs:DeleteMessageBatch"): BATCH,
    ("RESOURCE_MISMATCH", "states:SendTaskSuccess"): TASK,
    ("RESOURCE_MISMATCH", "states:SendTaskFailure"): TASK,
    ("RESOURCE_MISMATCH", "states:SendTaskHeartbeat"): TASK,
    (
        "RESOURCE_MISMATCH",
        "dynamodb:ListStreams",
    ): "takes streams as resources in AWS's own policies for functions behind a stream, although the reference lists none",
}


class NoManagedPolicies:
    """Policies that AWS manages are AWS's to check."""

    def load(self):
        return {}


def expanded(path):
    """The template after SAM's transform, for which code and definitions must seem to be in a bucket."""
    # The transform asks for a Region in the way of AWS's tools.
    os.environ["AWS_DEFAULT_REGION"] = REGION
    template = yaml_parse(path.read_text())
    template["Globals"]["Function"]["CodeUri"] = "s3://bucket/code"
    for resource in template["Resources"].values():
        if resource["Type"] == "AWS::Serverless::StateMachine":
            resource["Properties"]["DefinitionUri"] = "s3://bucket/definition"
    return transform(template, {}, NoManagedPolicies())


class Resolver:
    """Puts plausible values in the place of intrinsic functions."""

    def __init__(self, template):
        self.parameters, self.resources = template["Parameters"], template["Resources"]

    def ref(self, name):
        if name in PSEUDO_PARAMETERS:
            return PSEUDO_PARAMETERS[name]
        if name in self.parameters:
            return PARAMETERS.get(name) or str(self.parameters[name]["Default"])
        kind = self.resources[name]["Type"]
        return ARNS[kind].format(name) if kind in REF_IS_ARN else name

    def attribute(self, name, attribute):
        if not attribute.endswith("Arn"):
            return name
        arn = ARNS[self.resources[name]["Type"]].format(name)
        return f"{arn}/stream/label" if attribute == "StreamArn" else arn

    def substituted(self, text, values):
        def value(match):
            name, _, attribute = match[1].partition(".")
            if name in values:
                return self.value(values[name])
            return self.attribute(name, attribute) if attribute else self.ref(name)

        return re.sub(r"\$\{([^!}]+)\}", value, text)

    def value(self, value):
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, dict):
            return value
        match value:
            case {"Ref": name}:
                return self.ref(name)
            case {"Fn::GetAtt": path}:
                return self.attribute(*(path if isinstance(path, list) else path.split(".")))
            case {"Fn::Sub": [text, values]}:
                return self.substituted(text, values)
            case {"Fn::Sub": text}:
                return self.substituted(text, {})
        unknown = [key for key in value if key.startswith("Fn::")]
        if unknown:
            raise SystemExit(f"{unknown[0]} in a policy: teach local/check_policies.py what it stands for")
        return {key: self.value(item) for key, item in value.items()}


def documents(value):
    """Every policy document below a resource's properties."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "PolicyDocument":
                yield item
            else:
                yield from documents(item)
    elif isinstance(value, list):
        for item in value:
            yield from documents(item)


def policies(template):
    """The policies by the name of their resource."""
    resolver = Resolver(template)
    for name, resource in template["Resources"].items():
        if resource["Type"] != "AWS::IoT::Policy":
            for document in documents(resource["Properties"]):
                yield name, resolver.value(document)


def listed(value):
    return value if isinstance(value, list) else [value]


def parts(policy):
    """The policy action by action, so that each finding is of one."""
    if "${" not in json.dumps(policy):
        # SAM leaves the version out. The old one that then counts lacks variables, and nothing else that is used here.
        policy = {"Version": "2012-10-17", **policy}
    for statement in listed(policy["Statement"]):
        for action in listed(statement.get("Action", [])) or [None]:
            part = {**statement, "Action": action} if action else statement
            yield action, {**policy, "Statement": [part]}


def findings(policy):
    """What stands against a policy."""
    for action, part in parts(policy):
        for finding in parliament.analyze_policy_string(json.dumps(part)).findings:
            if (finding.issue, action) not in ACCEPTED:
                # A wildcard's detail lists everything that it stands for.
                detail = textwrap.shorten(str(finding.detail or ""), 300)
                yield f"{action}: {finding.issue}: {parliament.enhance_finding(finding).title} {detail}"


def main():
    default = Path(__file__).resolve().parent.parent / "template.yaml"
    checked = list(policies(expanded(Path(sys.argv[1]) if len(sys.argv) > 1 else default)))
    found = [f"{name}: {finding}" for name, policy in checked for finding in findings(policy)]
    for finding in found:
        print(finding)
    if found:
        raise SystemExit(1)
    print(f"{len(checked)} IAM policies are valid")


if __name__ == "__main__":
    main()
