"""Step Functions for the local cloud: moto's interpreter, whose tasks call the emulator on MOTO_PORT.

Usage: MOTO_PORT=4566 GATEWAY_PORT=4566 MOTO_ACCOUNT_ID=000000000000 python stepfunctions_local.py 4567

GATEWAY_PORT is the emulator itself; on MOTO_PORT a proxy may be before it that counts and disturbs what state machines call.

Definitions are written for AWS. What moto lacks is closed here, one gap after the other, each named where it is closed.
"""

import copy
import datetime
import functools
import hashlib
import os
import re
import sys
import threading
import time
import uuid

import boto3
import jsonata
import moto.stepfunctions.parser.asl.jsonata.jsonata as jsonata_bridge
import urllib3
from botocore.config import Config
from botocore.session import get_session
from jsonata.utils import Utils
from moto.core.config import default_user_config
from moto.core.exceptions import AWSError
from moto.core.responses import EmptyResult
from moto.server import main
from moto.stepfunctions.parser.api import EvaluationFailedEventDetails, ExecutionStatus, HistoryEventType
from moto.stepfunctions.parser.asl.component.common.error_name.error_equals_decl import ErrorEqualsDecl
from moto.stepfunctions.parser.asl.component.common.error_name.failure_event import FailureEvent, FailureEventException
from moto.stepfunctions.parser.asl.component.common.error_name.states_error_name import StatesErrorName
from moto.stepfunctions.parser.asl.component.common.error_name.states_error_name_type import StatesErrorNameType
from moto.stepfunctions.parser.asl.component.common.retry.jitter_strategy_decl import JitterStrategyDecl
from moto.stepfunctions.parser.asl.component.common.string.string_expression import StringJSONata
from moto.stepfunctions.parser.asl.component.intrinsic.jsonata import get_intrinsic_functions_declarations
from moto.stepfunctions.parser.asl.component.state.exec.execute_state import ExecutionState
from moto.stepfunctions.parser.asl.component.state.exec.state_task import lambda_eval_utils, mock_eval_utils
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service import state_task_service_sqs
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service.state_task_service import StateTaskService
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service.state_task_service_aws_sdk import (
    StateTaskServiceAwsSdk,
)
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service.state_task_service_callback import (
    StateTaskServiceCallback,
)
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service.state_task_service_dynamodb import (
    StateTaskServiceDynamoDB,
)
from moto.stepfunctions.parser.asl.eval.callback.callback import (
    CallbackOutcomeTimedOut,
    HeartbeatTimedOut,
    HeartbeatTimeoutError,
)
from moto.stepfunctions.parser.asl.eval.environment import Environment
from moto.stepfunctions.parser.asl.eval.event.event_detail import EventDetails
from moto.stepfunctions.parser.asl.jsonata.jsonata import JSONataException, extract_jsonata_variable_references
from moto.stepfunctions.parser.asl.parse.asl_parser import AmazonStateLanguageParser
from moto.stepfunctions.parser.asl.utils.encoding import to_json_str
from moto.stepfunctions.parser.mocking.mock_config import MockedResponseReturn, MockedResponseThrow

# This import also loads every module that imported a function that is replaced here by name.
from moto.stepfunctions.parser.models import StepFunctionsParserBackend
from moto.stepfunctions.responses import StepFunctionResponse

ENDPOINT = f"http://127.0.0.1:{os.environ['MOTO_PORT']}"
# What is asked here is no call to AWS, and not for a proxy to count.
POLICIES_ENDPOINT = f"http://127.0.0.1:{os.environ['GATEWAY_PORT']}"
PARALLEL_CALLS = 400


def replace_everywhere(name, function):
    """Gives every module that imported the function `name` from moto this one instead."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("moto.stepfunctions") and hasattr(module, name):
            setattr(module, name, function)


# Gap: moto has no JSONata evaluator, and it writes the variables into the text of each expression (unescaped), which
# breaks at the first quotation mark in a device's error message. Here an expression is compiled once, and the values
# are bound to it.


class UnsupportedResult(Exception):
    """The expression's value is not JSON."""


@functools.lru_cache(maxsize=4096)
def compiled(expression):
    """The expression, parsed, with moto's definitions of the functions that Step Functions adds to JSONata."""
    references = extract_jsonata_variable_references(expression)
    return jsonata.Jsonata(f"({get_intrinsic_functions_declarations(references - set(FUNCTIONS))}{expression})")


def hash_of(data, algorithm="SHA-256"):
    """Gap: moto's $hash returns a sentence that says it is not supported."""
    return hashlib.new(algorithm.replace("SHA-", "SHA").lower(), data.encode()).hexdigest()


def uuid4():
    """Gap: moto's $uuid returns a sentence that says it is not supported."""
    return str(uuid.uuid4())


FUNCTIONS = {"$hash": hash_of, "$uuid": uuid4}
FUNCTION_BINDINGS = {name[1:]: jsonata.Jsonata.JLambda(function) for name, function in FUNCTIONS.items()}


def evaluate(expression, bindings):
    """The value of the expression; `None` is JSON's null; raises for anything that is not JSON."""
    # One instance a call: the evaluator keeps the time and the input of the running evaluation in it.
    instance = copy.copy(compiled(expression))
    instance.set_output_convert_nulls(False)
    jsonata.Jsonata.CURRENT.jsonata = instance
    # To the evaluator, a variable that holds Python's `None` is undefined and not null.
    values = {name: Utils.NULL_VALUE if value is None else value for name, value in bindings.items()}
    value = instance.evaluate(None, {**FUNCTION_BINDINGS, **values})
    if value is None:
        raise UnsupportedResult("returned nothing (undefined)")
    return plain(value)


def plain(value):
    """A copy that holds nothing but JSON; a whole number is an integer, as it is in JavaScript."""
    if value is None or value is Utils.NULL_VALUE:
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    raise UnsupportedResult("returned an unsupported result type")


def evaluation_failed(env, cause):
    """States.QueryEvaluationError, as AWS reports it, in the history and as the state's failure."""
    name = StatesErrorName(typ=StatesErrorNameType.StatesQueryEvaluationError)
    details = EvaluationFailedEventDetails(cause=cause, error=name.error_name)
    event = FailureEvent(
        env=env,
        error_name=name,
        event_type=HistoryEventType.EvaluationFailed,
        event_details=EventDetails(evaluationFailedEventDetails=details),
    )
    return FailureEventException(failure_event=event)


def states_data(env):
    """Gap: moto's context object holds the start of the execution as a datetime; AWS has ISO 8601 text there."""
    execution = env.states._states_data["context"]["Execution"]
    if isinstance(execution["StartTime"], datetime.datetime):
        text = execution["StartTime"].astimezone(datetime.UTC).isoformat(timespec="milliseconds")
        execution["StartTime"] = text.replace("+00:00", "Z")
    return env.states._states_data


def eval_expression(self, env):
    variables = {**env.variable_store._outer_scope, **env.variable_store._inner_scope}
    try:
        value = evaluate(self.expression, {**variables, "states": states_data(env)})
    except UnsupportedResult as error:
        raise evaluation_failed(env, f"The JSONata expression '{self.expression}' {error}.") from error
    except Exception as error:
        raise evaluation_failed(env, f"The JSONata expression '{self.expression}' failed: {error}") from error
    env.stack.append(value)


def eval_text(expression):
    """The other callers of moto's evaluator hand it one text with everything inside."""
    try:
        return evaluate(expression, {})
    except UnsupportedResult:
        return None
    except Exception as error:
        raise JSONataException("UNKNOWN", str(error)) from error


StringJSONata._eval_body = eval_expression
jsonata_bridge.eval_jsonata_expression = eval_text
replace_everywhere("eval_jsonata_expression", eval_text)


# Gap: moto makes a new client for every task, signs with "ak"/"sk", and allows ten connections. Here a state machine calls
# with a session of its role, which the emulator holds to the role's policies. The root key pair comes from the environment.

_clients = {}
_clients_lock = threading.Lock()
YEAR_SECONDS = 365 * 24 * 3600


def session_of(role_arn):
    """Credentials of a role; the emulator gives them for as long as they are asked for."""
    sts = boto3.client("sts", endpoint_url=ENDPOINT)
    assumed = sts.assume_role(RoleArn=role_arn, RoleSessionName="states", DurationSeconds=YEAR_SECONDS)["Credentials"]
    return boto3.Session(assumed["AccessKeyId"], assumed["SecretAccessKey"], assumed["SessionToken"])


def shared_client(region, service, state_credentials=None):
    """The one client of this service for this role."""
    role_arn = state_credentials and state_credentials.role_arn
    with _clients_lock:
        key = (service, region, role_arn)
        if key not in _clients:
            # A task may run for as long as its state allows: Step Functions keeps the time, not the client.
            config = Config(
                parameter_validation=False,
                retries={"total_max_attempts": 1},
                connect_timeout=60,
                read_timeout=24 * 3600,
                max_pool_connections=PARALLEL_CALLS,
            )
            session = session_of(role_arn) if role_arn else boto3
            _clients[key] = session.client(service, region_name=region, endpoint_url=ENDPOINT, config=config)
        return _clients[key]


replace_everywhere("boto_client_for", shared_client)


# Gap: moto passes the members of aws-sdk tasks on as they are written (`ThingName`); botocore wants `thingName`, and
# the answer comes back in the capitals of Step Functions.

_session = get_session()


@functools.lru_cache(maxsize=256)
def operation_model(service, operation):
    return _session.get_service_model(service).operation_model(operation)


def _operation(task):
    action = task.resource.api_action
    return operation_model(task._get_boto_service_name(), action[0].upper() + action[1:])


def _normalise_parameters(self, parameters, *_):
    self._to_boto_request(parameters, _operation(self).input_shape)


def _normalise_response(self, response, *_):
    shape = _operation(self).output_shape
    if response and shape:
        self._from_boto_response(response, shape)


StateTaskServiceAwsSdk._normalise_parameters = _normalise_parameters
StateTaskServiceAwsSdk._normalise_response = _normalise_response


# Gap: moto knows few of the names that aws-sdk tasks use for services whose name in botocore is another.

StateTaskService._SERVICE_NAME_SFN_TO_BOTO_OVERRIDES.update(
    {
        "cloudwatchlogs": "logs",
        "eventbridge": "events",
        "iotdataplane": "iot-data",
        "iotjobsdataplane": "iot-jobs-data",
    }
)


# Gap: moto names errors after botocore (`iot.ResourceNotFoundException`); AWS says `Iot.ResourceNotFoundException`.


@functools.lru_cache(maxsize=64)
def service_error_name(api_name):
    """The service's name in an error, made of its service id as AWS does it: `DynamoDB` becomes `DynamoDb`."""
    service = StateTaskService._SERVICE_NAME_SFN_TO_BOTO_OVERRIDES.get(api_name.lower(), api_name.lower())
    words = _session.get_service_model(service).service_id.replace("IoT", "Iot").split()
    return "".join(re.sub(r"(?<=[A-Z])[A-Z]", lambda letter: letter[0].lower(), word) for word in words)


StateTaskServiceAwsSdk._normalise_service_error_name = staticmethod(service_error_name)


# Gap: with HeartbeatSeconds moto waits for the next heartbeat only. It misses an answer that came before it began to
# wait, which is common here (the function that stores the token finds an early answer), and forgets TimeoutSeconds.


def wait_for_task_token(self, env, timeout_seconds, callback_endpoint, heartbeat_endpoint):
    begin = beat = time.monotonic()

    def notify():
        nonlocal beat
        beat = time.monotonic()

    if heartbeat_endpoint:
        heartbeat_endpoint.notify = notify
    while env.is_running():
        ends = [begin + timeout_seconds]
        if heartbeat_endpoint:
            ends.append(beat + heartbeat_endpoint._heartbeat_seconds)
        outcome = callback_endpoint.wait(timeout=max(0, min(ends) - time.monotonic()))
        if outcome is not None:
            return outcome
        now = time.monotonic()
        if now >= begin + timeout_seconds:
            break
        if heartbeat_endpoint and now >= beat + heartbeat_endpoint._heartbeat_seconds:
            return HeartbeatTimedOut()
    return CallbackOutcomeTimedOut(callback_id=callback_endpoint.callback_id)


StateTaskServiceCallback._eval_wait_for_task_token = wait_for_task_token


# Gap: moto gives all attempts of a task the same token, takes an answer to one that has ended for good, and lets the second
# attempt look for its answer without a pause. On AWS each attempt has a token of its own, which ends with it.

_evaluate_attempt = StateTaskServiceCallback._evaluate_with_timeout


def evaluate_attempt(self, env):
    context = env.states.context_object
    if "Task" not in context.context_object_data:
        return _evaluate_attempt(self, env)
    if context.context_object_data["State"]["RetryCount"]:
        env.callback_pool_manager.add(context.update_task_token())
    token = context.context_object_data["Task"]["Token"]
    try:
        return _evaluate_attempt(self, env)
    finally:
        env.callback_pool_manager._pool.pop(token, None)


StateTaskServiceCallback._evaluate_with_timeout = evaluate_attempt


# Gap: AWS tells of a missed heartbeat as States.Timeout too, but matches it with States.HeartbeatTimeout as well.


class MissedHeartbeat(StatesErrorName):
    NAMES = ("States.HeartbeatTimeout", "States.Timeout")

    def __init__(self):
        super().__init__(StatesErrorNameType.StatesTimeout)

    def __eq__(self, other):
        return isinstance(other, StatesErrorName) and other.error_name in self.NAMES


_callback_failure = StateTaskServiceCallback._from_error


def callback_failure(self, env, ex):
    failure = _callback_failure(self, env, ex)
    if isinstance(ex, HeartbeatTimeoutError):
        failure.error_name = MissedHeartbeat()
    return failure


StateTaskServiceCallback._from_error = callback_failure


# Gap: moto's States.ALL matches every error. AWS's leaves out those after which Step Functions gives up
# (https://docs.aws.amazon.com/step-functions/latest/dg/concepts-error-handling.html).

NEVER_MATCHED = ("States.DataLimitExceeded", "States.Runtime")

_error_equals = ErrorEqualsDecl._eval_body


def error_equals(self, env):
    name = env.stack[-1].error_name
    _error_equals(self, env)
    if name in NEVER_MATCHED:
        env.stack[-1] = name in [known.error_name for known in self.error_names]


ErrorEqualsDecl._eval_body = error_equals


# Gap: where AWS puts an empty string into the error output (a failure without a cause), moto puts null.

_error_output = ExecutionState._construct_error_output_value


def error_output(failure_event):
    return {name: value or "" for name, value in _error_output(failure_event).items()}


ExecutionState._construct_error_output_value = staticmethod(error_output)


# Gap: an execution that is being started has no environment yet, on which moto fails when it looks for a task's token.

_get_executions = StepFunctionsParserBackend._get_executions


def get_executions(self, status=None):
    executions = _get_executions(self, status)
    return [execution for execution in executions if getattr(execution.exec_worker, "env", None)]


StepFunctionsParserBackend._get_executions = get_executions


# Gap: moto drops the cause that SendTaskFailure gives.


def send_task_failure(self):
    token, error, cause = (self._get_param(name) for name in ("taskToken", "error", "cause"))
    self.stepfunction_backend.send_task_failure(token, error=error, cause=cause)
    return EmptyResult()


StepFunctionResponse.send_task_failure = send_task_failure


# Gap: moto knows no policies. Who is not the root user is checked by the emulator, which gets the same request with the ARN of
# the state machine: AWS checks the end of a task on that, although the request does not name it.


_emulator = urllib3.PoolManager(maxsize=PARALLEL_CALLS)


def state_machine_of(response):
    """The state machine that the request is about; none if its task has ended or never was."""
    arn, token = response._get_param("stateMachineArn"), response._get_param("taskToken")
    if arn:
        return arn
    for execution in response.stepfunction_backend._get_executions(ExecutionStatus.RUNNING):
        if execution.exec_worker.env.callback_pool_manager.get(token):
            return execution.state_machine_arn
    return None


def check_policies(response):
    if f"Credential={os.environ['AWS_ACCESS_KEY_ID']}/" in response.headers.get("Authorization", ""):
        return
    arn = state_machine_of(response)
    if arn:
        headers = {**response.headers, "x-local-state-machine": arn}
        answer = _emulator.request("POST", POLICIES_ENDPOINT, body=response.body, headers=headers, retries=False)
        if answer.status != 200:
            raise AWSError(answer.json()["message"], answer.json()["__type"], answer.status)


def checked(operation):
    @functools.wraps(operation)
    def check_and_operate(self):
        check_policies(self)
        return operation(self)

    return check_and_operate


for _operation_name in ("start_execution", "send_task_success", "send_task_failure", "send_task_heartbeat"):
    setattr(StepFunctionResponse, _operation_name, checked(getattr(StepFunctionResponse, _operation_name)))


# Gap: AWS has room for a thousand Lambda functions at once. Here they share a few processors: so many starts at the same
# time would take longer than the functions may, so the calls wait for each other.

_invoke_lambda_function = lambda_eval_utils._invoke_lambda_function
_lambda_slots = threading.BoundedSemaphore(max(8, 4 * (os.cpu_count() or 1)))


def invoke_lambda_function(*arguments, **keywords):
    with _lambda_slots:
        return _invoke_lambda_function(*arguments, **keywords)


lambda_eval_utils._invoke_lambda_function = invoke_lambda_function


# Gap: JSONata has one kind of number, and no document says whether a whole one that it has computed comes as 3600 or as 3600.0.
# Here it comes as the latter, under the names that state machines compute: what reads it so reads the other as well.

COMPUTED = ("urlLifetimeSeconds", "connectedAt", "waitsUntil")

_to_payload_type = lambda_eval_utils.to_payload_type


def as_computed(value):
    if not isinstance(value, dict):
        return value
    return {
        key: float(item) if key in COMPUTED and type(item) is int else as_computed(item) for key, item in value.items()
    }


lambda_eval_utils.to_payload_type = lambda payload: _to_payload_type(as_computed(payload))
state_task_service_sqs.to_json_str = lambda body: to_json_str(as_computed(body))


# Gap: moto takes any name, calls every execution without a name `None`, and starts two executions when two requests with
# the same name come at the same time.

_start_execution = StepFunctionsParserBackend.start_execution
_start_lock = threading.Lock()


def start_execution(self, state_machine_arn, name=None, *arguments, **keywords):
    name = name or uuid4()
    self._validate_name(name)
    with _start_lock:
        return _start_execution(self, state_machine_arn, name, *arguments, **keywords)


StepFunctionsParserBackend.start_execution = start_execution


# Gap: moto parses the whole definition once more for each execution, which takes longer than running it. A copy of what
# was parsed does as well.

_parse = functools.lru_cache(maxsize=64)(AmazonStateLanguageParser.parse)


def parse(definition):
    program, tree = _parse(definition)
    return copy.deepcopy(program), tree


AmazonStateLanguageParser.parse = staticmethod(parse)


# Gap: AWS's TestState API can give a task's answer in place of its service; moto can too, but lets nobody ask for it. Here
# an execution can, for its own tasks: the member `mocked` of its input lists the answers of a state, one an attempt, as
# `{"result": …}` or `{"error": …, "cause": …}`. The last one is for all further attempts.


def mocked_answers(env):
    """The answers that the execution's input lists for the state that is run; none if the state is not mocked."""
    execution = env.states._states_data["context"]["Execution"]["Input"]
    mocked = execution.get("mocked", {}) if isinstance(execution, dict) else {}
    return mocked.get(env.next_state_name)


def current_mocked_response(env):
    answers = mocked_answers(env)
    attempt = env.states._states_data["context"]["State"]["RetryCount"]
    answer = answers[min(attempt, len(answers) - 1)]
    if "error" in answer:
        return MockedResponseThrow(0, 0, answer["error"], answer.get("cause", ""))
    return MockedResponseReturn(0, 0, answer["result"])


def error_name_of(name):
    """The names of Step Functions itself are of a type of their own."""
    for known in StatesErrorNameType:
        if known.to_name() == name:
            return StatesErrorName(typ=known)
    return _custom_error_name(name)


_custom_error_name = mock_eval_utils.CustomErrorName
mock_eval_utils.CustomErrorName = error_name_of
Environment.is_mocked_mode = lambda env: mocked_answers(env) is not None
Environment.get_current_mocked_response = current_mocked_response


# A given error keeps its name; moto's task of DynamoDB would give it another one.

_dynamodb_failure = StateTaskServiceDynamoDB._from_error


def dynamodb_failure(self, env, ex):
    return ex.failure_event if isinstance(ex, FailureEventException) else _dynamodb_failure(self, env, ex)


StateTaskServiceDynamoDB._from_error = dynamodb_failure


# Such an execution asks after which error what is done, and not for the hour that the waits between the attempts take.

_jitter = JitterStrategyDecl._eval_body


def jitter(self, env):
    _jitter(self, env)
    if mocked_answers(env) is not None:
        env.stack[-1] = 0


JitterStrategyDecl._eval_body = jitter


if __name__ == "__main__":
    default_user_config["stepfunctions"]["execute_state_machine"] = True
    main(["-H", "127.0.0.1", "-p", sys.argv[1]])
