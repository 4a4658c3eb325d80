"""Publishes MQTT messages by the data plane of AWS IoT: the AWS CLI publishes one a start, which takes most of a second.

Usage: AWS_ENDPOINT_URL=http://127.0.0.1:4566 python publish_messages.py FILE

Each line of the file is {"topic": "…", "payload": {…}}.
"""

import json
import os
import sys

import boto3


def main():
    client = boto3.client("iot-data", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    with open(sys.argv[1], encoding="utf-8") as lines:
        for message in map(json.loads, lines):
            client.publish(topic=message["topic"], qos=1, payload=json.dumps(message["payload"]))


if __name__ == "__main__":
    main()
