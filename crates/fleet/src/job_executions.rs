//! Job executions as AWS IoT Jobs has them now, on its data plane, which knows those that have not ended.

use crate::error::{aws, code, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_iotjobsdataplane::types::JobExecutionStatus;
use protocol::job::NextExecution;
use protocol::{JobId, ThingName};

/// The job executions of all things.
#[derive(Debug, Clone)]
pub struct JobExecutions {
    client: aws_sdk_iotjobsdataplane::Client,
}

impl JobExecutions {
    /// Asks with that client.
    pub fn new(client: aws_sdk_iotjobsdataplane::Client) -> Self {
        Self { client }
    }

    /// The status of a job execution that is queued or in progress; none if it has ended or is gone, also if another one has its
    /// number now, because the job was deleted and made again.
    pub async fn pending(
        &self,
        thing: &ThingName,
        job: &JobId,
        number: i64,
        queued_at: Option<i64>,
    ) -> Result<Option<JobExecutionStatus>, Error> {
        let describe = self.client.describe_job_execution().thing_name(thing.as_str()).job_id(job.as_str());
        let execution = match describe.execution_number(number).include_job_document(false).send().await {
            Ok(described) => described.execution,
            Err(error) => match code(&error) {
                Some("TerminalStateException" | "ResourceNotFoundException") => None,
                _ => return Err(aws("iot:DescribeJobExecution", &error)),
            },
        };
        let this = execution.filter(|execution| queued_at.is_none_or(|time| time == unix_seconds(execution.queued_at)));
        Ok(this.and_then(|execution| execution.status))
    }

    /// The job execution that is next for a thing, if it has not begun.
    pub async fn next_queued(&self, thing: &ThingName) -> Result<Option<NextExecution>, Error> {
        let describe = self.client.describe_job_execution().thing_name(thing.as_str()).job_id("$next");
        let execution = match describe.include_job_document(true).send().await {
            Ok(described) => described.execution,
            Err(error) if code(&error) == Some("ResourceNotFoundException") => None,
            Err(error) => return Err(aws("iot:DescribeJobExecution", &error)),
        };
        let Some(next) = execution.filter(|execution| execution.status == Some(JobExecutionStatus::Queued)) else {
            return Ok(None);
        };
        let missing = || Error::new(ErrorName::ServiceError, "iot:DescribeJobExecution: no id, number or document");
        let document = next.job_document.as_deref().ok_or_else(missing)?;
        Ok(Some(NextExecution {
            job_id: next.job_id.ok_or_else(missing)?.parse().map_err(unbuilt)?,
            execution_number: next.execution_number.ok_or_else(missing)?,
            queued_at: Some(next.queued_at),
            job_document: serde_json::from_str(document).map_err(unbuilt)?,
        }))
    }
}

/// A time of AWS IoT Jobs in Unix seconds, which is what its data plane is documented to say; its milliseconds elsewhere are no other
/// time (<https://docs.aws.amazon.com/iot/latest/apireference/API_iot-jobs-data_JobExecution.html>).
pub fn unix_seconds(time: i64) -> i64 {
    const FIRST_IN_MILLISECONDS: i64 = 100_000_000_000;
    if time < FIRST_IN_MILLISECONDS { time } else { time / 1000 }
}
