"""Session tokens of functions for the emulator, whose own are short.

Gap: the credentials of a function's role have a token of many hundred characters on AWS, and every address that the function
signs carries it, percent-encoded: 1.3 to 1.8 KB in all. Devices have buffers; with short tokens nobody sees that they are too small.
"""

import base64
import hashlib

import ministack.core.lambda_runtime as lambda_runtime
import ministack.services.lambda_svc as lambda_svc
import ministack.services.sts as sts

# With this many bytes the addresses of images have about 1.5 KB.
TOKEN_BYTES = 750


def long_token(short):
    """Of the characters that AWS's tokens have: base64 with + and /, which an address must encode."""
    return base64.b64encode(hashlib.shake_256(short.encode()).digest(TOKEN_BYTES)).decode()


def install():
    """Makes the emulator give functions tokens as long as AWS's."""
    execution_credentials = lambda_runtime.execution_credentials

    def with_long_token(config):
        credentials = execution_credentials(config)
        if credentials["AWS_SESSION_TOKEN"]:
            token = long_token(credentials["AWS_SESSION_TOKEN"])
            sts._sessions[credentials["AWS_ACCESS_KEY_ID"]]["SessionToken"] = token
            credentials["AWS_SESSION_TOKEN"] = token
        return credentials

    for module in (lambda_runtime, lambda_svc):
        module.execution_credentials = with_long_token
