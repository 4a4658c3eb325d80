"""The account's address of AWS IoT, for the emulator, which names one where nobody is.

Gap: DescribeEndpoint answers with a host below `localhost`, which most machines do not know, and with the port of the HTTP
endpoint, where no device can connect. On AWS one address serves devices (MQTT) and programs (HTTPS); here it is that of the
broker, with its port, and the broker's listener passes requests on to the HTTP endpoint.
(https://docs.aws.amazon.com/iot/latest/developerguide/iot-connect-devices.html)
"""

import asyncio
import os
import ssl

import ministack.services.iot as iot
from ministack.core.responses import json_response

HOST = "127.0.0.1"
CHUNK_BYTES = 65536

_describe_endpoint = iot._describe_endpoint
_serve_connection = iot._mtls_serve_conn


def describe_endpoint(query):
    if query.get("endpointType", "iot:Data-ATS") == "iot:Data-ATS":
        return json_response({"endpointAddress": f"{HOST}:{iot._mtls_port()}"})
    return _describe_endpoint(query)


class Begun:
    """A stream of which somebody has read the beginning."""

    def __init__(self, beginning, rest):
        self.beginning, self.rest = beginning, rest

    async def read(self, size):
        beginning, self.beginning = self.beginning, b""
        return beginning or await self.rest.read(size)


async def copy(source, target):
    try:
        while data := await source.read(CHUNK_BYTES):
            target.write(data)
            await target.drain()
    except (OSError, ssl.SSLError):
        pass
    finally:
        target.close()


async def serve_connection(reader, writer):
    try:
        beginning = await reader.read(CHUNK_BYTES)
    except (OSError, ssl.SSLError):
        beginning = b""
    reader = Begun(beginning, reader)
    # A request begins with its method; the first packet of MQTT, CONNECT, with 0x10.
    if not beginning[:1].isupper():
        return await _serve_connection(reader, writer)
    answers, requests = await asyncio.open_connection(HOST, os.environ["GATEWAY_PORT"])
    await asyncio.gather(copy(reader, requests), copy(answers, writer))


def install():
    """Makes the emulator name an address that serves devices and programs."""
    iot._describe_endpoint = describe_endpoint
    iot._mtls_serve_conn = serve_connection
