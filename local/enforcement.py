"""Enforcement of policies by the emulator (AUTH=true): what it refuses and AWS allows, and what it allows and AWS refuses.

Where the local cloud does not enforce even so is said in docs/security.md.
"""

import asyncio
import json
import re
from urllib.parse import parse_qs

import cbor2
import ministack.core.iam_actions as iam_actions
import ministack.core.iam_evaluator as iam_evaluator
import ministack.services.iot as iot
import ministack.services.sqs as sqs
import ministack.services.stepfunctions as stepfunctions
from ministack.core.responses import error_response_json, json_response

# The header in which the Step Functions of the local cloud ask whether a caller may do what it asks for.
STATE_MACHINE = "x-local-state-machine"


# Gap: nobody is the service that a role trusts. The root user assumes any role here, for Step Functions (which is another
# program) and for tests that try what a function's role may do.

_evaluate_trust_policy = iam_evaluator.evaluate_trust_policy


def evaluate_trust_policy(document, caller_arn, *arguments, **keywords):
    return caller_arn.endswith(":root") or _evaluate_trust_policy(document, caller_arn, *arguments, **keywords)


# Gap: the emulator's endpoint has no TLS, which the policies of buckets ask for (aws:SecureTransport).

_resolve_condition_key = iam_evaluator._resolve_condition_key


def resolve_condition_key(key, context):
    return "true" if key.lower() == "aws:securetransport" else _resolve_condition_key(key, context)


# Gap: the emulator knows no conditions on the namespace of metrics, and so refuses what they allow.

_request_tag_context = iam_actions.request_tag_context


def namespace_of(body):
    """The namespace in a request, whichever of CloudWatch's protocols it is of."""
    if body[:1] == b"{":
        return json.loads(body).get("Namespace")
    form = parse_qs(body.decode("latin-1")).get("Namespace")
    return form[0] if form else cbor2.loads(body).get("Namespace")


def request_context(service, iam_action, body, params):
    context = _request_tag_context(service, iam_action, body, params)
    return {**context, "cloudwatch:namespace": namespace_of(body)} if iam_action == "cloudwatch:PutMetricData" else context


# Gap: calls in the protocol that newer clients of CloudWatch speak (smithy-rpc-v2) are not checked. Their resource is "*",
# for functions send metrics only, which are no resources.

RPC_V2 = re.compile(r"/service/[^/]+/operation/(\w+)")

_extract_iam_action = iam_actions.extract_iam_action


def extract_iam_action(service, method, path, *arguments, **keywords):
    operation = RPC_V2.fullmatch(path)
    namespace = iam_actions.SERVICE_TO_IAM_NAMESPACE.get(service)
    if operation and namespace:
        return f"{namespace}:{operation[1]}"
    return _extract_iam_action(service, method, path, *arguments, **keywords)


# Gap: the default policy of topics that CloudFormation makes lacks its condition, so that it lets everybody in the account
# publish, whatever their own policies say. With the condition (AWS:SourceOwner) it says nothing about such calls.

_resource_policy = iam_evaluator._resource_policy


def resource_policy(service, resource_arn):
    found = _resource_policy(service, resource_arn)
    return None if found and service == "sns" and "__default_policy_ID" in found[0] else found


# Gap: policies of things cannot name attributes of theirs.
# (https://docs.aws.amazon.com/iot/latest/developerguide/thing-policy-variables.html)

_policy_context = iot._mqtt_policy_context


def policy_context(account_id, region, certificate_id, client_id):
    context = _policy_context(account_id, region, certificate_id, client_id)
    if context["iot:connection.thing.isattached"] == "true":
        with iot.request_scope(account_id, region):
            attributes = iot._things[client_id].get("attributes") or {}
        context.update({f"iot:connection.thing.attributes[{name.lower()}]": value for name, value in attributes.items()})
    return context


# Gap: a client that shows no certificate gets in and may do anything.

_policy_allows = iot._WSSession._policy_allows


def policy_allows(session, action, resource):
    return session._evaluates_policies() and _policy_allows(session, action, resource)


# Gap: a certificate that is not ACTIVE any more keeps the connections that it has, and one that is REVOKED may become ACTIVE.
# AWS ends the connections within a few minutes; here it is at once.
# (https://docs.aws.amazon.com/iot/latest/apireference/API_UpdateCertificate.html,
# https://docs.aws.amazon.com/iot/latest/developerguide/revoke-ca-cert.html)

_handle_certificate = iot._handle_certificate


async def end(session):
    session._forced_disconnect_reason = "AUTH_ERROR"
    await session._send({"type": "websocket.close", "code": 1000})


def handle_certificate(method, path, body, query):
    certificate = iot._certificates.get(path.rsplit("/", 1)[-1])
    if method != "PUT" or certificate is None:
        return _handle_certificate(method, path, body, query)
    if certificate["status"] == "REVOKED" and query.get("newStatus") != "REVOKED":
        # Which error AWS answers with is not documented.
        return error_response_json("CertificateStateException", "The certificate is revoked.", 406)
    answer = _handle_certificate(method, path, body, query)
    if certificate["status"] != "ACTIVE":
        for session in list(iot._connected_clients.values()):
            if session.certificate_id == certificate["certificateId"]:
                asyncio.run_coroutine_threadsafe(end(session), iot._mtls_loop)
    return answer


# Gap: a topic rule needs its role to exist, and not to allow what the rule does.

_dispatch_rule_sqs = iot._dispatch_rule_sqs


def dispatch_rule_sqs(account_id, region, rule_name, spec, event):
    with iot.request_scope(account_id, region):
        queue = sqs._get_q(spec["queueUrl"])
    role = spec["roleArn"].rsplit("/", 1)[-1]
    context = iam_evaluator.EvalContext(
        principal_arn=spec["roleArn"],
        principal_type="AssumedRole",
        principal_account=account_id,
        action="sqs:SendMessage",
        resource_arn=queue["attributes"]["QueueArn"],
        region=region,
    )
    policies = iam_evaluator._gather_role_policies(role, account_id)
    if iam_evaluator.evaluate(context, policies).decision != "Allow":
        raise PermissionError(f"{role} must not send to {spec['queueUrl']}")
    _dispatch_rule_sqs(account_id, region, rule_name, spec, event)


# Gap: executions run elsewhere (stepfunctions_local.py), where policies are unknown. A request that somebody has sent there
# comes here to be checked, and is not carried out.

INDICES = "/indices/"

_extract_resource_arn = iam_actions.extract_resource_arn
_handle_request = stepfunctions.handle_request


def extract_resource_arn(service, method, path, headers, *arguments, **keywords):
    if service == "states" and STATE_MACHINE in headers:
        return headers[STATE_MACHINE]
    if RPC_V2.fullmatch(path):
        return "*"
    # Gap: the emulator knows no resource of an index, and so refuses what a policy allows on one.
    if service == "iot" and path.startswith(INDICES):
        region, account = arguments[2:4]
        return f"arn:aws:iot:{region}:{account}:index/{path.removeprefix(INDICES)}"
    return _extract_resource_arn(service, method, path, headers, *arguments, **keywords)


async def handle_request(method, path, headers, body, query_params):
    if STATE_MACHINE in headers:
        return json_response({})
    return await _handle_request(method, path, headers, body, query_params)


def install():
    """Makes the emulator enforce as AWS does."""
    iam_evaluator.evaluate_trust_policy = evaluate_trust_policy
    iam_evaluator._resolve_condition_key = resolve_condition_key
    iam_evaluator._resource_policy = resource_policy
    iam_actions.request_tag_context = request_context
    iam_actions.extract_iam_action = extract_iam_action
    iot._POLICY_VARIABLE_RE = re.compile(r"\$\{(iot:[\w.\[\]-]+)\}")
    iot._mqtt_policy_context = policy_context
    iot._WSSession._policy_allows = policy_allows
    iot._handle_certificate = handle_certificate
    iot._dispatch_rule_sqs = dispatch_rule_sqs
    iam_actions.extract_resource_arn = extract_resource_arn
    stepfunctions.handle_request = handle_request
