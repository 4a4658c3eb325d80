"""Versions of things for the emulator, which counts them and looks at none that is expected.

Gap: UpdateThing takes `expectedVersion` and changes the thing whatever its version is. AWS refuses with
VersionConflictException then. (https://docs.aws.amazon.com/iot/latest/apireference/API_UpdateThing.html)
"""

import ministack.services.iot as iot

_update_thing = iot._update_thing


def update_thing(name, payload):
    thing, expected = iot._things.get(name), payload.get("expectedVersion")
    if thing is not None and expected is not None and expected != thing.get("version", 1):
        message = f"The version {expected} of thing {name} is not its current one"
        return iot.error_response_json("VersionConflictException", message, 409)
    return _update_thing(name, payload)


def install():
    """Makes the emulator look at expected versions."""
    iot._update_thing = update_thing
