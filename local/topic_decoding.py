"""Topics that are published over HTTPS, for the emulator, which decodes each once and takes any number of slashes.

Gap: no document says how often AWS decodes the topic in the path of a Publish request, which the SDK has encoded. So both are
tried here: of two topics whose lengths differ by one, one is decoded once and the other, if that yields a valid topic, once more.

Gap: AWS takes seven slashes in a topic at most, those of `$aws/rules/{rule}/` and the like not counted
(https://docs.aws.amazon.com/general/latest/gr/iot-core.html#message-broker-limits).
"""

from urllib.parse import unquote

import ministack.services.iot_data as iot_data
from ministack.core.responses import error_response_json

MAX_SLASHES = 7

_publish, _validate_topic = iot_data._publish, iot_data._validate_topic


def is_decoded_twice(topic):
    """Whether a topic, decoded once, is decoded once more."""
    return len(topic) % 2 == 1


def validate_topic(topic):
    refusal = _validate_topic(topic)
    if refusal is None and not topic.startswith("$aws/") and topic.count("/") > MAX_SLASHES:
        message = f"Topic has more than {MAX_SLASHES} slashes: {topic}"
        return error_response_json("InvalidRequestException", message, 400)
    return refusal


async def publish(topic, *arguments):
    decoded = unquote(topic) if is_decoded_twice(topic) else topic
    return await _publish(decoded, *arguments)


def install():
    """Makes the emulator decode as AWS may."""
    iot_data._publish = publish
    iot_data._validate_topic = validate_topic
