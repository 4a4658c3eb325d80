//! What a device is asked, and what it says, in words that no encoding leaks into.

use crate::OperationId;
use serde::{Deserialize, Serialize};

/// A wait inside an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Step {
    /// The device has a connection to the broker.
    DeviceOnline,
    /// The device has accepted the command and begins to download.
    DownloadStarted,
    /// The whole image is on the device.
    FirmwareTransferred,
    /// The download operation has ended on the device: image checked and written.
    DownloadOperationDone,
    /// The device has rebooted into the image that it now reports.
    DeviceRebooted,
}

impl Step {
    /// Every step, in the order of a good upgrade.
    pub const ALL: [Self; 5] = [
        Self::DeviceOnline,
        Self::DownloadStarted,
        Self::FirmwareTransferred,
        Self::DownloadOperationDone,
        Self::DeviceRebooted,
    ];

    /// The step's name, as state machines, tables and JSON devices write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeviceOnline => "DEVICE_ONLINE",
            Self::DownloadStarted => "DOWNLOAD_STARTED",
            Self::FirmwareTransferred => "FIRMWARE_TRANSFERRED",
            Self::DownloadOperationDone => "DOWNLOAD_OPERATION_DONE",
            Self::DeviceRebooted => "DEVICE_REBOOTED",
        }
    }
}

/// A firmware image as a device is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Firmware {
    /// The version that the device must report after its reboot.
    pub version: String,
    /// Where the image is, valid for longer than the download may take.
    pub url: String,
    /// SHA-256 of the image, 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Length of the image in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Ed25519 signature over the image, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// What the cloud asks a device to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Download the image, install it, reboot into it.
    Download {
        /// The operation that every answer names.
        operation_id: OperationId,
        /// The image.
        firmware: Firmware,
    },
    /// Drop the download of that operation if it has not been installed yet.
    CancelDownload {
        /// The operation to give up.
        operation_id: OperationId,
    },
}

impl Command {
    /// The operation that the command belongs to.
    pub fn operation_id(&self) -> &OperationId {
        match self {
            Self::Download { operation_id, .. } | Self::CancelDownload { operation_id } => operation_id,
        }
    }
}

/// Why a device could not do a step, in its own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFailure {
    /// The device's code: a USP error number, or a short name.
    pub code: String,
    /// The device's explanation.
    pub message: String,
}

impl DeviceFailure {
    /// The code with which a device fails [`Step::FirmwareTransferred`] when the server says that the image's address has
    /// expired. The device keeps what it has and waits for the same command with a fresh address.
    pub const ADDRESS_EXPIRED: &str = "ADDRESS_EXPIRED";
}

/// How far a step has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepOutcome {
    /// Done.
    Succeeded {
        /// The version that the device reported with it; only after a reboot.
        firmware_version: Option<String>,
    },
    /// Still at it: ends nothing, extends the deadline.
    InProgress {
        /// Per cent.
        progress: Option<u8>,
    },
    /// Failed, and the operation with it.
    Failed(DeviceFailure),
}

/// A device's answer to a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// The operation that it answers.
    pub operation_id: OperationId,
    /// The step that it speaks of.
    pub step: Step,
    /// How that step stands.
    pub outcome: StepOutcome,
}

/// What a device says unasked: no operation waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The device has booted by itself, or for the first time.
    Booted {
        /// The device's reason, such as `RemoteReboot` or `FirstBoot`.
        cause: String,
        /// The version that it runs now, if it said so.
        firmware_version: Option<String>,
    },
    /// The device has said who it is or which version it runs, and nothing else.
    Introduced {
        /// What it called that.
        name: String,
    },
    /// Well-formed, but nothing that this system knows: kept by its name, for the log.
    Other {
        /// What the device called it.
        name: String,
    },
}

/// One thing that a device said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// An answer to a command.
    Response(Response),
    /// Something unasked.
    Event(DeviceEvent),
}
