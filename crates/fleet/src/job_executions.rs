//! Job executions as AWS IoT Jobs has them now, on its data plane, which knows those that have not ended.

use crate::aws::now_seconds;
use crate::error::{aws, code, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_iotjobsdataplane::types::{JobExecution, JobExecutionStatus};
use protocol::job::NextExecution;
use protocol::{JobId, ThingName};

/// After which AWS IoT Jobs tells of a job execution what it has announced of it. No document says that it tells at once, and it
/// announces once.
const SETTLED_SECONDS: i64 = 30;

/// How a job execution stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is queued or in progress.
    Pending(JobExecutionStatus),
    /// It has ended.
    Ended,
    /// AWS IoT Jobs does not know it: it was deleted, or cannot be read yet.
    Unknown,
}

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

    /// How a job execution stands. It has ended also if another one has its number now, because the job was deleted and made
    /// again.
    pub async fn standing(
        &self,
        thing: &ThingName,
        job: &JobId,
        number: i64,
        queued_at: Option<i64>,
    ) -> Result<Standing, Error> {
        let describe = self.client.describe_job_execution().thing_name(thing.as_str()).job_id(job.as_str());
        let described = match describe.execution_number(number).include_job_document(false).send().await {
            Ok(described) => described.execution,
            Err(error) => match code(&error) {
                Some("TerminalStateException") => return Ok(Standing::Ended),
                Some("ResourceNotFoundException") => return Ok(Standing::Unknown),
                _ => return Err(aws("iot:DescribeJobExecution", &error)),
            },
        };
        // To the second: nobody says that it is rounded alike wherever it is told.
        let is_this = |time: i64, execution: &JobExecution| time.abs_diff(unix_seconds(execution.queued_at)) <= 1;
        let this = described.filter(|execution| queued_at.is_none_or(|time| is_this(time, execution)));
        Ok(this.and_then(|execution| execution.status).map_or(Standing::Ended, Standing::Pending))
    }

    /// The job execution that is at the head of a thing's queue.
    pub async fn next(&self, thing: &ThingName) -> Result<Next, Error> {
        let describe = self.client.describe_job_execution().thing_name(thing.as_str()).job_id("$next");
        let execution = match describe.include_job_document(true).send().await {
            Ok(described) => described.execution,
            Err(error) if code(&error) == Some("ResourceNotFoundException") => None,
            Err(error) => return Err(aws("iot:DescribeJobExecution", &error)),
        };
        let Some(next) = execution else { return Ok(Next::Nothing) };
        let missing = || Error::new(ErrorName::ServiceError, "iot:DescribeJobExecution: no id or number");
        let job_id = next.job_id.ok_or_else(missing)?.parse().map_err(unbuilt)?;
        if next.status != Some(JobExecutionStatus::Queued) {
            return Ok(Next::Begun(job_id));
        }
        // A document that cannot be read is none of ours.
        let job_document = next.job_document.as_deref().and_then(|document| serde_json::from_str(document).ok());
        Ok(Next::Queued(NextExecution {
            job_id,
            execution_number: next.execution_number.ok_or_else(missing)?,
            queued_at: Some(next.queued_at),
            job_document: job_document.unwrap_or_default(),
        }))
    }
}

/// What is at the head of a thing's queue of job executions, ours or not.
#[derive(Debug, Clone)]
pub enum Next {
    /// Nothing: the queue is empty.
    Nothing,
    /// One that waits to be begun.
    Queued(NextExecution),
    /// One of that job, in progress: whatever is behind it waits.
    Begun(JobId),
}

/// Whether what was announced then (Unix seconds) may not be told yet.
pub(crate) fn is_unsettled(announced_at: i64) -> bool {
    now_seconds() - announced_at < SETTLED_SECONDS
}

/// A time of AWS IoT Jobs in Unix seconds, which is what its data plane is documented to say; its milliseconds elsewhere are no other
/// time (<https://docs.aws.amazon.com/iot/latest/apireference/API_iot-jobs-data_JobExecution.html>).
pub fn unix_seconds(time: i64) -> i64 {
    const FIRST_IN_MILLISECONDS: i64 = 100_000_000_000;
    if time < FIRST_IN_MILLISECONDS { time } else { time / 1000 }
}
