"""Puts the AWS CLI beside the programs of the Python environment that runs this.

Usage: python install_aws_cli.py

AWS publishes version 2 as a program with a Python of its own, for installers and containers. On PyPI it is only as the layer with
which the AWS CDK gives it to Lambda functions: an archive in an archive in a package.
"""

import importlib.metadata
import io
import pathlib
import sys
import tarfile
import zipfile

PACKAGE = "aws-cdk-asset-awscli-v2"
LAYER = "package/lib/layer.zip"


def layer():
    [archive] = [file for file in importlib.metadata.files(PACKAGE) if file.name.endswith(".jsii.tgz")]
    with tarfile.open(archive.locate()) as package:
        return zipfile.ZipFile(io.BytesIO(package.extractfile(LAYER).read()))


def main():
    prefix = pathlib.Path(sys.prefix)
    with layer() as archive:
        [program] = [name for name in archive.namelist() if name.endswith("/dist/aws")]
        folder = program.removesuffix("aws")
        archive.extractall(prefix, [name for name in archive.namelist() if name.startswith(folder)])
    # Archives of this kind do not say which files are programs.
    (prefix / program).chmod(0o755)
    (prefix / "bin/aws").symlink_to(prefix / program)


if __name__ == "__main__":
    main()
