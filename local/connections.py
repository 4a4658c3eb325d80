"""Calls about clients' connections, for the emulator, which lacks them.

Gap: GetThingConnectivityData, what fleet indexing knows of one thing, without a search, and
(https://docs.aws.amazon.com/iot/latest/apireference/API_GetThingConnectivityData.html)
DeleteConnection, which ends a client's connection.
(https://docs.aws.amazon.com/iot/latest/apireference/API_iotdata_DeleteConnection.html)
"""

import asyncio
from urllib.parse import unquote

import ministack.services.iot as iot
import ministack.services.iot_data as iot_data
from ministack.core.responses import error_response_json, get_account_id, get_region, json_response

CONNECTIONS = "/connections/"
CONNECTIVITY = "/connectivity-data"

_handle_thing = iot._handle_thing
_handle_request = iot_data.handle_request


def handle_thing(method, path, body, query):
    if method != "POST" or not path.endswith(CONNECTIVITY):
        return _handle_thing(method, path, body, query)
    thing = unquote(path.removeprefix("/things/").removesuffix(CONNECTIVITY))
    if thing not in iot._things:
        return error_response_json("ResourceNotFoundException", f"Thing {thing} does not exist", 404)
    known = iot._thing_connectivity(get_account_id(), get_region(), thing)
    if "timestamp" in known:
        # Searches tell milliseconds, this call seconds.
        known["timestamp"] /= 1000
    return json_response({"thingName": thing, **known})


async def end(session, query):
    session._forced_disconnect_reason = "API_INITIATED_DISCONNECT"
    if iot._qp_bool(query, "cleanSession"):
        session._persist_session = False
    if iot._qp_bool(query, "preventWillMessage"):
        session._will_topic = None
    await session._send({"type": "websocket.close", "code": 1000})


def delete_connection(client_id, query):
    session = iot._connected_clients.get((get_account_id(), get_region(), client_id))
    if session is None:
        return error_response_json("ResourceNotFoundException", f"Client {client_id} is not connected", 404)
    asyncio.run_coroutine_threadsafe(end(session, query), iot._mtls_loop)
    return json_response({})


async def handle_request(method, path, headers, body, query):
    if method == "DELETE" and path.startswith(CONNECTIONS):
        return delete_connection(unquote(path.removeprefix(CONNECTIONS)), query)
    return await _handle_request(method, path, headers, body, query)


def install():
    """Gives the emulator both calls."""
    iot._handle_thing = handle_thing
    iot_data.handle_request = handle_request
