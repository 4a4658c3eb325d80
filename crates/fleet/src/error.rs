//! The one list of error names, and how AWS's errors map to it.

use aws_sdk_dynamodb::config::http::HttpResponse;
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use lambda_runtime::Diagnostic;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The name of everything that can go wrong. State machines catch by these names, job executions carry them as
/// their reason, logs and dead letters are found by them; so a name, once given, stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorName {
    /// A field of a payload is missing, unknown or out of range.
    InvalidInput,
    /// A device's message cannot be read.
    MalformedMessage,
    /// A message is larger than the broker carries.
    MessageTooLarge,
    /// A reading's value is none that a sensor on Earth can measure, or its time is none at which it can have.
    ReadingOutOfRange,
    /// A device's message speaks for another thing than the one that sent it.
    SenderMismatch,
    /// The job id belongs to a job that was made from another payload.
    JobConflict,
    /// The job's target, a thing or thing group, does not exist.
    TargetNotFound,
    /// There is no image under that key in the firmware bucket.
    ArtifactNotFound,
    /// The thing is not in the registry.
    DeviceNotFound,
    /// The thing's attribute `upgradable` is `false`.
    NotUpgradable,
    /// The device refused the command.
    DownloadRefused,
    /// The image did not get to the device.
    TransferFailed,
    /// The image's address has expired before the device had all of the image: it is signed again.
    AddressExpired,
    /// The image arrived, but the device could not check or write it.
    InstallFailed,
    /// The device booted its old image.
    ActivationFailed,
    /// The device rebooted and reports another version than the target.
    VersionMismatch,
    /// No answer came within a step's deadline.
    DeviceTimedOut,
    /// The thing has no attribute `externalId`, so nobody knows whose settings it shall have.
    ExternalIdMissing,
    /// The settings API knows no profile of that external id.
    ProfileNotFound,
    /// The settings API refused for good, such as for its key.
    SettingsApiRefused,
    /// The settings API did not answer, or not yet: try again later.
    SettingsApiUnavailable,
    /// The settings API's answer is not what `settings.schema.json` allows.
    InvalidSettings,
    /// The device did not take over at least one of its settings.
    SettingFailed,
    /// A worker's program failed with an exception. Tasks fail with this name; the execution's error is the exception's own
    /// name, which state machines could mistake for an error of the platform.
    WorkerException,
    /// No worker on premises has answered, or shown a sign of life, within a job's deadlines.
    WorkerTimedOut,
    /// A worker's result is not where the worker said that it has put it.
    ResultMissing,
    /// The device has come online anew, and that session's workflow brings it its settings.
    SessionSuperseded,
    /// The job execution was cancelled, removed or rejected while its workflow ran.
    JobCanceled,
    /// The job's own timer ended the job execution while its workflow ran.
    JobTimedOut,
    /// The function's environment lacks a variable, or has a value that cannot be used.
    Misconfigured,
    /// The workflow was stopped by hand or by the limit of its whole duration, and could not report.
    WorkflowStopped,
    /// An AWS API refused the request itself, such as for a value: sent again it is refused again.
    RequestRefused,
    /// An AWS API refused for its rate: try again later.
    Throttled,
    /// An AWS API did not answer, or with an error of its own: try again later.
    ServiceUnavailable,
    /// An AWS API refused until somebody mends something: a missing permission, a missing resource.
    ServiceError,
}

impl ErrorName {
    /// Every name.
    pub const ALL: [Self; 35] = [
        Self::InvalidInput,
        Self::MalformedMessage,
        Self::MessageTooLarge,
        Self::ReadingOutOfRange,
        Self::SenderMismatch,
        Self::JobConflict,
        Self::TargetNotFound,
        Self::ArtifactNotFound,
        Self::DeviceNotFound,
        Self::NotUpgradable,
        Self::DownloadRefused,
        Self::TransferFailed,
        Self::AddressExpired,
        Self::InstallFailed,
        Self::ActivationFailed,
        Self::VersionMismatch,
        Self::DeviceTimedOut,
        Self::ExternalIdMissing,
        Self::ProfileNotFound,
        Self::SettingsApiRefused,
        Self::SettingsApiUnavailable,
        Self::InvalidSettings,
        Self::SettingFailed,
        Self::WorkerException,
        Self::WorkerTimedOut,
        Self::ResultMissing,
        Self::SessionSuperseded,
        Self::JobCanceled,
        Self::JobTimedOut,
        Self::Misconfigured,
        Self::WorkflowStopped,
        Self::RequestRefused,
        Self::Throttled,
        Self::ServiceUnavailable,
        Self::ServiceError,
    ];

    /// The name, as state machines and logs write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidInput => "InvalidInput",
            Self::MalformedMessage => "MalformedMessage",
            Self::MessageTooLarge => "MessageTooLarge",
            Self::ReadingOutOfRange => "ReadingOutOfRange",
            Self::SenderMismatch => "SenderMismatch",
            Self::JobConflict => "JobConflict",
            Self::TargetNotFound => "TargetNotFound",
            Self::ArtifactNotFound => "ArtifactNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::NotUpgradable => "NotUpgradable",
            Self::DownloadRefused => "DownloadRefused",
            Self::TransferFailed => "TransferFailed",
            Self::AddressExpired => "AddressExpired",
            Self::InstallFailed => "InstallFailed",
            Self::ActivationFailed => "ActivationFailed",
            Self::VersionMismatch => "VersionMismatch",
            Self::DeviceTimedOut => "DeviceTimedOut",
            Self::ExternalIdMissing => "ExternalIdMissing",
            Self::ProfileNotFound => "ProfileNotFound",
            Self::SettingsApiRefused => "SettingsApiRefused",
            Self::SettingsApiUnavailable => "SettingsApiUnavailable",
            Self::InvalidSettings => "InvalidSettings",
            Self::SettingFailed => "SettingFailed",
            Self::WorkerException => "WorkerException",
            Self::WorkerTimedOut => "WorkerTimedOut",
            Self::ResultMissing => "ResultMissing",
            Self::SessionSuperseded => "SessionSuperseded",
            Self::JobCanceled => "JobCanceled",
            Self::JobTimedOut => "JobTimedOut",
            Self::Misconfigured => "Misconfigured",
            Self::WorkflowStopped => "WorkflowStopped",
            Self::RequestRefused => "RequestRefused",
            Self::Throttled => "Throttled",
            Self::ServiceUnavailable => "ServiceUnavailable",
            Self::ServiceError => "ServiceError",
        }
    }

    /// Whether trying again can help. What AWS refuses for good may pass once an operator has fixed a permission, and so
    /// may what a function lacks.
    ///
    /// State machines stop at once at every other name, and at [`FINAL_AWS_ERRORS`]; whatever else a task fails with they try
    /// again, so that a name that AWS introduces next year ends no workflow.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Self::Throttled
                | Self::ServiceUnavailable
                | Self::ServiceError
                | Self::Misconfigured
                | Self::SettingsApiUnavailable
                | Self::AddressExpired
        )
    }
}

/// Errors of AWS that cannot pass by themselves: what a task names does not exist, or its request is malformed. Step Functions
/// puts the service's name before the error that the service's API reference lists
/// (<https://docs.aws.amazon.com/step-functions/latest/dg/concepts-error-handling.html>).
pub const FINAL_AWS_ERRORS: [&str; 7] = [
    "DynamoDB.ResourceNotFoundException",
    "Iot.InvalidRequestException",
    "Iot.ResourceNotFoundException",
    "Lambda.ResourceNotFoundException",
    "SNS.InvalidParameterException",
    "SNS.NotFoundException",
    "States.QueryEvaluationError",
];

impl fmt::Display for ErrorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How long a sentence is, in bytes.
const MAX_MESSAGE_BYTES: usize = 8192;

/// What went wrong: a stable name for machines and a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {message}")]
pub struct Error {
    /// The name.
    pub name: ErrorName,
    /// The sentence.
    pub message: String,
}

impl Error {
    /// An error of that name. Of a sentence that quotes a whole message, the beginning is kept, and of an address what is no
    /// secret.
    pub fn new(name: ErrorName, message: impl Into<String>) -> Self {
        let mut message = protocol::redacted(&message.into());
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        Self { name, message }
    }

    /// A payload's field is not as it must be.
    pub fn invalid(field: &str, value: impl fmt::Display, expected: &str) -> Self {
        Self::new(ErrorName::InvalidInput, format!("{field}: got {value}, expected {expected}"))
    }
}

/// Lambda reports `name` as the `errorType` that a state machine's Retry and Catch match.
impl From<Error> for Diagnostic {
    fn from(error: Error) -> Self {
        Self { error_type: error.name.as_str().to_owned(), error_message: error.message }
    }
}

impl From<protocol::DecodeError> for Error {
    fn from(error: protocol::DecodeError) -> Self {
        let name = match error {
            protocol::DecodeError::TooLarge(_) => ErrorName::MessageTooLarge,
            protocol::DecodeError::UnknownTopic(_)
            | protocol::DecodeError::TooDeep
            | protocol::DecodeError::Malformed(_) => ErrorName::MalformedMessage,
        };
        Self::new(name, error.to_string())
    }
}

/// The error code that an AWS API answered with, such as `ResourceNotFoundException`.
pub fn code<E: ProvideErrorMetadata, R>(error: &SdkError<E, R>) -> Option<&str> {
    error.as_service_error().and_then(ProvideErrorMetadata::code)
}

/// A value of ours that a library refuses to build or to write: a fault of this program.
pub fn unbuilt(error: impl fmt::Display) -> Error {
    Error::new(ErrorName::ServiceError, error.to_string())
}

/// Names the error of an AWS API call. `action` is the call, such as `iot:CreateJob`.
pub fn aws<E>(action: &str, error: &SdkError<E, HttpResponse>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let Some(service_error) = error.as_service_error() else {
        let error = aws_sdk_dynamodb::error::DisplayErrorContext(error).to_string();
        return Error::new(ErrorName::ServiceUnavailable, format!("{action}: {error}"));
    };
    let code = service_error.code().unwrap_or("Unknown");
    let message = format!("{action}: {code}: {}", service_error.message().unwrap_or("no message"));
    let name = match code {
        "ThrottlingException"
        | "Throttling"
        | "ThrottledException"
        | "Throttled"
        | "TooManyRequestsException"
        | "RequestLimitExceeded"
        | "LimitExceededException"
        | "ProvisionedThroughputExceededException"
        | "TransactionInProgressException"
        | "SlowDown" => ErrorName::Throttled,
        "InternalFailureException"
        | "InternalFailure"
        | "InternalServerError"
        | "InternalException"
        | "ServiceUnavailableException"
        | "ServiceUnavailable" => ErrorName::ServiceUnavailable,
        // Of a secret that is about to be deleted: an operator can mend that.
        "InvalidRequestException" if action.starts_with("secretsmanager:") => ErrorName::ServiceError,
        // What the services that are called here say of a malformed request or value.
        "ValidationException"
        | "ValidationError"
        | "InvalidRequestException"
        | "InvalidParameter"
        | "InvalidParameterException"
        | "InvalidParameterValue"
        | "InvalidParameterValueException"
        | "InvalidParameterCombination"
        | "InvalidArgument"
        | "InvalidMessageContents"
        | "InvalidExecutionInput"
        | "InvalidName"
        | "InvalidOutput"
        | "SerializationException" => ErrorName::RequestRefused,
        // Whatever it is called: the answer to a HEAD request has no body that could say it.
        _ if error.raw_response().is_some_and(|response| response.status().is_server_error()) => {
            ErrorName::ServiceUnavailable
        }
        _ => ErrorName::ServiceError,
    };
    Error::new(name, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_same_in_rust_json_and_lambda() {
        for name in ErrorName::ALL {
            assert_eq!(serde_json::to_value(name).unwrap(), name.as_str());
            assert_eq!(Diagnostic::from(Error::new(name, "why")).error_type, name.as_str());
        }
    }

    /// A value that a table does not take is not taken an hour later either; a permission may be there by then.
    #[test]
    fn a_request_that_is_refused_for_what_it_says_is_told_from_one_that_may_pass() {
        use aws_sdk_dynamodb::{error::ErrorMetadata, operation::update_item::UpdateItemError};
        use aws_sdk_s3::primitives::SdkBody;
        for (code, name) in [
            ("ValidationException", ErrorName::RequestRefused),
            ("AccessDeniedException", ErrorName::ServiceError),
            ("ResourceNotFoundException", ErrorName::ServiceError),
            ("ThrottlingException", ErrorName::Throttled),
            ("InternalServerError", ErrorName::ServiceUnavailable),
        ] {
            let response = HttpResponse::new(400.try_into().unwrap(), SdkBody::empty());
            let error = UpdateItemError::generic(ErrorMetadata::builder().code(code).build());
            let error = aws("dynamodb:UpdateItem", &SdkError::service_error(error, response));
            assert_eq!((error.name, error.name.is_transient()), (name, code != "ValidationException"), "{code}");
        }
    }

    /// Found by made-up faults. S3 answers a HEAD request without a body, and so without a code.
    #[test]
    fn an_unnamed_error_of_a_server_may_pass() {
        use aws_sdk_s3::{error::ErrorMetadata, operation::head_object::HeadObjectError, primitives::SdkBody};
        for (status, name) in
            [(403, ErrorName::ServiceError), (500, ErrorName::ServiceUnavailable), (503, ErrorName::ServiceUnavailable)]
        {
            let response = HttpResponse::new(u16::try_into(status).unwrap(), SdkBody::empty());
            let error = HeadObjectError::generic(ErrorMetadata::builder().build());
            assert_eq!(aws("s3:HeadObject", &SdkError::service_error(error, response)).name, name, "{status}");
        }
    }
}
