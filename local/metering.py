"""What AWS meters and the emulator does not tell: it is written to a file, one JSON object a line, for the benchmark of costs.

METERING names the file; without it nothing is written. The lines:

    {"what": "publish", "topic", "bytes", "client"}   a message that is published; client is null for the cloud itself
    {"what": "deliver", "topic", "bytes"}             a message that a client gets
    {"what": "packet", "kind", "client"}              CONNECT, SUBSCRIBE or PUBACK of a client
    {"what": "rule", "rule"}                          a message on the topic of a rule
    {"what": "action", "rule", "kind"}                an action of a rule
    {"what": "send", "queue"}                         a message that a topic puts into a queue
    {"what": "receive" | "delete", "queue", "messages"}  a batch that an event source mapping takes from a queue, or deletes
    {"what": "invoke", "function", "memory", "milliseconds"}  an invocation
    {"what": "log", "function", "events", "bytes"}    what an invocation has written, without the platform's own lines
"""

import json
import os
import threading
import time

import ministack.services.dynamodb as dynamodb
import ministack.services.iot as iot
import ministack.services.lambda_svc as lambda_svc
import ministack.services.sns as sns
import ministack.services.sqs as sqs

PACKETS = {iot.PKT_CONNECT: "CONNECT", iot.PKT_SUBSCRIBE: "SUBSCRIBE", iot.PKT_PUBACK: "PUBACK"}

_lock = threading.Lock()


def note(file, **line):
    with _lock:
        file.write(json.dumps(line) + "\n")
        file.flush()


def meter_iot(file):
    publish, deliver = iot.broker_publish, iot._WSSession.deliver_to_client
    packet, rule, action = iot._WSSession.handle_packet, iot._run_rule_actions, iot._dispatch_rule_action

    async def broker_publish(account_id, region, topic, payload, *arguments, **keywords):
        note(file, what="publish", topic=topic, bytes=len(payload or b""), client=keywords.get("client_id"))
        return await publish(account_id, region, topic, payload, *arguments, **keywords)

    async def deliver_to_client(session, topic, payload, qos):
        note(file, what="deliver", topic=topic, bytes=len(payload))
        return await deliver(session, topic, payload, qos)

    async def handle_packet(session, kind, flags, body):
        if kind in PACKETS:
            note(file, what="packet", kind=PACKETS[kind], client=session._client_id)
        return await packet(session, kind, flags, body)

    async def run_rule_actions(account_id, region, rule_, *arguments, **keywords):
        note(file, what="rule", rule=(rule_ or {}).get("ruleName"))
        return await rule(account_id, region, rule_, *arguments, **keywords)

    async def dispatch_rule_action(account_id, region, rule_name, action_, event):
        note(file, what="action", rule=rule_name, kind=next(iter(action_), None))
        return await action(account_id, region, rule_name, action_, event)

    iot.broker_publish, iot._WSSession.deliver_to_client = broker_publish, deliver_to_client
    iot._WSSession.handle_packet = handle_packet
    iot._run_rule_actions, iot._dispatch_rule_action = run_rule_actions, dispatch_rule_action


def meter_queues(file):
    deliver, receive, delete = sns._deliver_to_sqs, sqs._receive_messages_for_esm, sqs._delete_messages_for_esm

    def deliver_to_sqs(endpoint, *arguments, **keywords):
        note(file, what="send", queue=endpoint.rsplit(":", 1)[-1])
        return deliver(endpoint, *arguments, **keywords)

    def receive_messages(queue_url, limit):
        batch = receive(queue_url, limit)
        if batch:
            note(file, what="receive", queue=queue_url.rsplit("/", 1)[-1], messages=len(batch))
        return batch

    def delete_messages(queue_url, handles):
        note(file, what="delete", queue=queue_url.rsplit("/", 1)[-1], messages=len(handles))
        return delete(queue_url, handles)

    sns._deliver_to_sqs = deliver_to_sqs
    sqs._receive_messages_for_esm, sqs._delete_messages_for_esm = receive_messages, delete_messages


def meter_functions(file):
    execute, log = lambda_svc._execute_function_dispatch, lambda_svc._emit_lambda_logs

    def execute_function(func, config, *arguments, **keywords):
        started = time.monotonic()
        result = execute(func, config, *arguments, **keywords)
        milliseconds = (time.monotonic() - started) * 1000
        note(
            file,
            what="invoke",
            function=config.get("FunctionName"),
            memory=int(config.get("MemorySize", 128)),
            milliseconds=milliseconds,
        )
        return result

    def emit_logs(func, request_id, text, *arguments, **keywords):
        lines = text.splitlines()
        name = (func.get("config") or func).get("FunctionName")
        note(file, what="log", function=name, events=len(lines), bytes=sum(len(line.encode()) for line in lines))
        return log(func, request_id, text, *arguments, **keywords)

    lambda_svc._execute_function_dispatch, lambda_svc._emit_lambda_logs = execute_function, emit_logs


def meter_capacity():
    """A proxy before the cloud cannot ask for ConsumedCapacity in a request that its caller has signed; it asks in a header."""
    handle_request = dynamodb.handle_request

    async def handle(method, path, headers, body, query_params):
        asked = headers.get("x-return-consumed-capacity")
        if asked and body:
            body = json.dumps({"ReturnConsumedCapacity": asked, **json.loads(body)}).encode()
        return await handle_request(method, path, headers, body, query_params)

    dynamodb.handle_request = handle


def install():
    meter_capacity()
    path = os.environ.get("METERING")
    if path:
        file = open(path, "a", encoding="utf-8")
        meter_iot(file)
        meter_queues(file)
        meter_functions(file)
