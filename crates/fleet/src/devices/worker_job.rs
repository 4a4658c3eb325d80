//! A job for workers on premises: who may run it, and which answer counts. No I/O.
//!
//! The item holds the token of the state that waits, so the token never leaves the cloud: workers get a handle, the
//! operation and a secret that nobody can guess.

use crate::item_table::Item;
use crate::workflows::rendezvous::Wait;
use protocol::on_premises::Lease;
use protocol::{OperationId, WorkerName};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Items go two weeks after they were last written: longer than the longest wait, and than a broker keeps a session.
pub(super) const KEEP_SECONDS: i64 = 14 * 24 * 3600;

/// What workers know a job by: opaque to them, bound to its operation. The tenant is part of the item's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobHandle {
    /// The job: its execution's name.
    pub(super) operation: OperationId,
    secret: String,
}

impl JobHandle {
    /// Reads what a worker echoed; none if it was never a handle.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (operation, secret) = text.rsplit_once('.')?;
        Some(Self { operation: operation.parse().ok()?, secret: secret.to_owned() })
    }
}

impl fmt::Display for JobHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.operation, self.secret)
    }
}

/// How a job has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "camelCase")]
pub(super) enum Answer {
    /// With a result.
    Succeeded {
        /// As JSON text.
        result: String,
    },
    /// With a result that is kept in the bucket.
    Stored {
        /// Where.
        key: String,
        /// How large.
        bytes: u64,
    },
    /// With an exception.
    Failed {
        /// Its name.
        error: String,
        /// In detail.
        cause: String,
    },
}

/// The worker that runs the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    worker: WorkerName,
    request: String,
    /// In Unix milliseconds.
    until: i64,
}

/// All that is known of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WorkerJob {
    secret: String,
    /// The waiting state's token.
    pub(super) task_token: String,
    attempt: u32,
    /// How large a result may be to fit into the execution's output, in bytes.
    pub(super) room: u64,
    /// Whether the input is in the bucket.
    pub(super) input_is_stored: bool,
    holder: Option<Holder>,
    /// The last fencing number that was given; 0 before the first.
    fence: u64,
    /// The answer that counts.
    pub(super) answer: Option<Answer>,
    expires_at: i64,
    revision: u64,
}

impl Item for WorkerJob {
    const KEY: &'static str = "job";

    fn revision(&mut self) -> &mut u64 {
        &mut self.revision
    }
}

/// What is to be done when a state waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// Send the job to the workers.
    Send,
    /// The answer is there: the state's task ends with it.
    Answered,
    /// A later attempt of the state waits already.
    Superseded,
}

/// Whether a worker may run a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claimed {
    /// It may, with this fencing number.
    Granted(u64),
    /// Another worker runs it, for so many milliseconds at least.
    Held(u64),
    /// It has ended, or there is no such job.
    Over,
}

/// Whether a worker still has its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renewed {
    /// It has.
    Held,
    /// It has lost it.
    Lost,
    /// The job has ended, or there is no such job.
    Over,
}

/// What becomes of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judged {
    /// It counts.
    Counts,
    /// There is an answer already.
    Duplicate,
    /// It comes from a worker that has not the lease.
    Stale,
    /// There is no such job.
    Unknown,
}

/// What a state and its dispatch bring.
#[derive(Debug, Clone)]
pub(super) struct Dispatch {
    /// How the state waits.
    pub(super) wait: Wait,
    /// See [`WorkerJob::room`].
    pub(super) room: u64,
    /// See [`WorkerJob::input_is_stored`].
    pub(super) input_is_stored: bool,
}

impl WorkerJob {
    /// A state waits for the job. `secret` is for a job that is new.
    pub(super) fn expect(&mut self, dispatch: &Dispatch, secret: &str, now_seconds: i64) -> Expected {
        if self.is_known() && self.attempt > dispatch.wait.attempt {
            return Expected::Superseded;
        }
        if !self.is_known() {
            secret.clone_into(&mut self.secret);
        }
        self.task_token.clone_from(&dispatch.wait.task_token);
        self.attempt = dispatch.wait.attempt;
        self.room = dispatch.room;
        self.input_is_stored = dispatch.input_is_stored;
        self.expires_at = now_seconds + KEEP_SECONDS;
        if self.answer.is_some() { Expected::Answered } else { Expected::Send }
    }

    fn is_known(&self) -> bool {
        !self.secret.is_empty()
    }

    /// The handle of this job.
    pub(super) fn handle(&self, operation: &OperationId) -> JobHandle {
        JobHandle { operation: operation.clone(), secret: self.secret.clone() }
    }

    fn is_of(&self, handle: &JobHandle) -> bool {
        self.is_known() && self.secret == handle.secret
    }

    /// A worker wants to run the job. The same request gets the same answer; a worker that has begun anew gets a new
    /// lease. Times are in milliseconds, `now` since 1970.
    pub(super) fn claim(
        &mut self,
        handle: &JobHandle,
        worker: &WorkerName,
        request: &str,
        now: i64,
        lease: i64,
    ) -> Claimed {
        if !self.is_of(handle) || self.answer.is_some() {
            return Claimed::Over;
        }
        match &mut self.holder {
            Some(holder) if holder.worker == *worker && holder.request == request => holder.until = now + lease,
            Some(holder) if holder.worker != *worker && holder.until > now => {
                return Claimed::Held(u64::try_from(holder.until - now).unwrap_or_default());
            }
            _ => {
                self.fence += 1;
                self.holder = Some(Holder { worker: worker.clone(), request: request.to_owned(), until: now + lease });
            }
        }
        Claimed::Granted(self.fence)
    }

    /// A worker is still at it. A lease that has run out goes on if nobody else has claimed the job.
    pub(super) fn renew(&mut self, handle: &JobHandle, lease: &Lease, now: i64, length: i64) -> Renewed {
        if !self.is_of(handle) || self.answer.is_some() {
            return Renewed::Over;
        }
        match self.holder.as_mut().filter(|holder| holder.worker == lease.worker && self.fence == lease.fence) {
            Some(holder) => {
                holder.until = holder.until.max(now + length);
                Renewed::Held
            }
            None => Renewed::Lost,
        }
    }

    /// A worker gives the job back; false if it had not the lease.
    pub(super) fn release(&mut self, handle: &JobHandle, lease: &Lease) -> bool {
        let is_held = self.is_of(handle)
            && self.fence == lease.fence
            && self.holder.as_ref().is_some_and(|holder| holder.worker == lease.worker);
        if is_held {
            self.holder = None;
        }
        is_held
    }

    /// What an answer is worth. A plain worker has no lease, and is believed as long as no other has one.
    pub(super) fn judge(&self, handle: &JobHandle, lease: Option<&Lease>) -> Judged {
        if !self.is_of(handle) {
            return Judged::Unknown;
        }
        if self.answer.is_some() {
            return Judged::Duplicate;
        }
        let counts = match (lease, &self.holder) {
            (None, _) => self.fence == 0,
            (Some(lease), Some(holder)) => lease.fence == self.fence && lease.worker == holder.worker,
            (Some(_), None) => false,
        };
        if counts { Judged::Counts } else { Judged::Stale }
    }

    /// Keeps an answer, if it counts. The first one stays.
    pub(super) fn answer(&mut self, handle: &JobHandle, lease: Option<&Lease>, answer: &Answer) -> Judged {
        let judged = self.judge(handle, lease);
        if judged == Judged::Counts {
            self.answer = Some(answer.clone());
        }
        judged
    }

    /// Whether a plain worker's heartbeat is to be believed.
    pub(super) fn is_run_by_a_plain_worker(&self, handle: &JobHandle) -> bool {
        self.judge(handle, None) == Judged::Counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: i64 = 100;

    fn worker(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn lease(name: &str, fence: u64) -> Lease {
        Lease { worker: worker(name), fence }
    }

    fn dispatch(attempt: u32) -> Dispatch {
        let wait = Wait { task_token: format!("token-{attempt}"), attempt, expected_version: None };
        Dispatch { wait, room: 1000, input_is_stored: false }
    }

    fn operation() -> OperationId {
        "nightly.7".parse().unwrap()
    }

    fn job() -> (WorkerJob, JobHandle) {
        let mut job = WorkerJob::default();
        assert_eq!(job.expect(&dispatch(0), "5ec2e7", 0), Expected::Send);
        let handle = job.handle(&operation());
        (job, handle)
    }

    fn done() -> Answer {
        Answer::Succeeded { result: "57".into() }
    }

    #[test]
    fn a_handle_comes_back_as_it_went_and_stays_over_retries() {
        let (mut job, handle) = job();
        assert_eq!(handle.to_string(), "nightly.7.5ec2e7");
        assert_eq!(JobHandle::parse(&handle.to_string()), Some(handle.clone()));
        assert_eq!(JobHandle::parse("nothing"), None);
        assert_eq!(job.expect(&dispatch(2), "another", 0), Expected::Send);
        assert_eq!(job.handle(&operation()), handle);
        // A slow function of an earlier attempt.
        assert_eq!(job.expect(&dispatch(1), "another", 0), Expected::Superseded);
        assert_eq!(job.task_token, "token-2");
        assert_eq!(job.answer(&handle, None, &done()), Judged::Counts);
        assert_eq!(job.expect(&dispatch(3), "another", 0), Expected::Answered);
    }

    #[test]
    fn of_two_workers_one_runs_the_job() {
        let (mut job, handle) = job();
        assert_eq!(job.claim(&handle, &worker("a"), "1", 0, LEASE), Claimed::Granted(1));
        assert_eq!(job.claim(&handle, &worker("a"), "1", 10, LEASE), Claimed::Granted(1), "said twice");
        assert_eq!(job.claim(&handle, &worker("b"), "2", 50, LEASE), Claimed::Held(60));
        assert_eq!(job.renew(&handle, &lease("a", 1), 60, LEASE), Renewed::Held);
        assert_eq!(job.claim(&handle, &worker("b"), "2", 110, LEASE), Claimed::Held(50));
        // It dies, and the other takes over.
        assert_eq!(job.claim(&handle, &worker("b"), "2", 160, LEASE), Claimed::Granted(2));
        // It was only slow: what it says does not count any more.
        assert_eq!(job.renew(&handle, &lease("a", 1), 170, LEASE), Renewed::Lost);
        assert_eq!(job.answer(&handle, Some(&lease("a", 1)), &done()), Judged::Stale);
        assert_eq!(job.answer(&handle, Some(&lease("a", 2)), &done()), Judged::Stale, "another's number");
        assert!(!job.release(&handle, &lease("a", 1)));
        assert_eq!(job.answer(&handle, Some(&lease("b", 2)), &done()), Judged::Counts);
        assert_eq!(job.answer(&handle, Some(&lease("b", 2)), &done()), Judged::Duplicate);
        assert_eq!(job.claim(&handle, &worker("a"), "3", 180, LEASE), Claimed::Over);
        assert_eq!(job.renew(&handle, &lease("b", 2), 180, LEASE), Renewed::Over);
    }

    #[test]
    fn a_lease_that_ran_out_goes_on_if_nobody_else_came() {
        let (mut job, handle) = job();
        job.claim(&handle, &worker("a"), "1", 0, LEASE);
        assert_eq!(job.renew(&handle, &lease("a", 1), 500, LEASE), Renewed::Held);
        assert_eq!(job.claim(&handle, &worker("b"), "2", 550, LEASE), Claimed::Held(50));
    }

    #[test]
    fn a_worker_that_begins_anew_gets_a_new_lease_at_once() {
        let (mut job, handle) = job();
        job.claim(&handle, &worker("a"), "1", 0, LEASE);
        assert_eq!(job.claim(&handle, &worker("a"), "2", 10, LEASE), Claimed::Granted(2));
        assert_eq!(job.answer(&handle, Some(&lease("a", 1)), &done()), Judged::Stale);
    }

    #[test]
    fn a_job_that_was_given_back_is_free() {
        let (mut job, handle) = job();
        job.claim(&handle, &worker("a"), "1", 0, LEASE);
        assert!(job.release(&handle, &lease("a", 1)));
        assert!(!job.release(&handle, &lease("a", 1)), "said twice");
        assert_eq!(job.answer(&handle, Some(&lease("a", 1)), &done()), Judged::Stale);
        assert_eq!(job.claim(&handle, &worker("b"), "2", 10, LEASE), Claimed::Granted(2));
    }

    #[test]
    fn a_plain_worker_is_believed_until_another_has_a_lease() {
        let (mut job, handle) = job();
        assert!(job.is_run_by_a_plain_worker(&handle));
        let mut leased = job.clone();
        leased.claim(&handle, &worker("a"), "1", 0, LEASE);
        assert!(!leased.is_run_by_a_plain_worker(&handle));
        assert_eq!(leased.answer(&handle, None, &done()), Judged::Stale);
        assert_eq!(job.answer(&handle, None, &done()), Judged::Counts);
    }

    #[test]
    fn who_does_not_know_the_secret_can_do_nothing() {
        let (mut job, _) = job();
        let before = job.clone();
        for guess in ["nightly.7.", "nightly.7.5ec2e8"] {
            let guess = JobHandle::parse(guess).unwrap();
            assert_eq!(job.claim(&guess, &worker("a"), "1", 0, LEASE), Claimed::Over);
            assert_eq!(job.renew(&guess, &lease("a", 0), 0, LEASE), Renewed::Over);
            assert_eq!(job.answer(&guess, None, &done()), Judged::Unknown);
            assert!(!job.is_run_by_a_plain_worker(&guess));
            // Nor with what was never a job: nothing is written for it.
            let mut nothing = WorkerJob::default();
            assert_eq!(nothing.answer(&guess, None, &done()), Judged::Unknown);
            assert_eq!(nothing.claim(&guess, &worker("a"), "1", 0, LEASE), Claimed::Over);
            assert_eq!(nothing, WorkerJob::default());
        }
        assert_eq!(job, before);
    }
}
