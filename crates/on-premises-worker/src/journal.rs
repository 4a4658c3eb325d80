//! What the worker knows of its jobs, on disk: one file a job, so that a crash loses neither a job nor an answer.

use crate::jobs::{Answer, Stored};
use atomic_write_file::AtomicWriteFile;
use protocol::on_premises::JobMessage;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A journal that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// Two workers must not run each other's jobs.
    #[error("the journal {} is used by another worker: give each worker a folder of its own", .0.display())]
    InUse(PathBuf),
    /// The disk fails, or does not let us.
    #[error("the journal {} cannot be used: {error}", .folder.display())]
    Unusable {
        /// Which folder.
        folder: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A job on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// As it came.
    pub(crate) job: JobMessage,
    /// When it came, in Unix seconds.
    pub(crate) received: u64,
    /// What came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stored: Option<Stored>,
}

impl Entry {
    /// Of a job that has just come.
    pub(crate) fn new(job: JobMessage) -> Self {
        Self { job, received: seconds(SystemTime::now()), stored: None }
    }
}

/// A folder of entries, locked against other processes for as long as this lives.
#[derive(Debug)]
pub(crate) struct Journal {
    folder: PathBuf,
    _lock: File,
}

impl Journal {
    /// Opens the folder, or makes it.
    pub(crate) fn open(folder: &Path) -> Result<Self, JournalError> {
        let unusable = |error| JournalError::Unusable { folder: folder.to_owned(), error };
        // Inputs and handles are nobody else's business.
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(unusable)?;
        let lock = new_file(&folder.join("lock")).map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { folder: folder.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(JournalError::InUse(folder.to_owned())),
            Err(TryLockError::Error(error)) => Err(unusable(error)),
        }
    }

    /// What is known of a job. An entry that cannot be read is put aside: then nothing is.
    pub(crate) fn get(&self, handle: &str) -> io::Result<Option<Entry>> {
        read_entry(&self.path(handle, "json"))
    }

    /// Writes an entry, so that it is either there as a whole or not at all.
    pub(crate) fn put(&self, entry: &Entry) -> io::Result<()> {
        let bytes = serde_json::to_vec(entry)?;
        write(&self.path(&entry.job.task_token, "json"), &bytes)
    }

    /// Writes what came of a job; does nothing for a job that is not known.
    pub(crate) fn record(&self, handle: &str, stored: Stored) -> io::Result<()> {
        match self.get(handle)? {
            Some(entry) => self.put(&Entry { stored: Some(stored), ..entry }),
            None => Ok(()),
        }
    }

    /// Keeps a result that is too large for a message.
    pub(crate) fn put_result(&self, handle: &str, bytes: &[u8]) -> io::Result<()> {
        write(&self.path(handle, "result"), bytes)
    }

    /// The bytes of such a result.
    pub(crate) fn result(&self, handle: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path(handle, "result"))
    }

    /// Forgets a job.
    pub(crate) fn remove(&self, handle: &str) -> io::Result<()> {
        for extension in ["json", "result"] {
            remove(&self.path(handle, extension))?;
        }
        Ok(())
    }

    /// All jobs, the oldest first.
    pub(crate) fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for path in self.files()? {
            if path.extension() == Some(OsStr::new("json")) {
                entries.extend(read_entry(&path)?);
            }
        }
        entries.sort_by_key(|entry| entry.received);
        Ok(entries)
    }

    /// Removes what was last written longer than `age` ago, unless the job's file is one of `kept`.
    pub(crate) fn prune(&self, age: Duration, kept: &[String]) -> io::Result<usize> {
        let Some(oldest) = SystemTime::now().checked_sub(age) else { return Ok(0) };
        let kept: Vec<_> = kept.iter().map(|handle| name(handle)).collect();
        let mut removed = 0;
        for path in self.files()? {
            let is_kept = path.file_stem().is_some_and(|stem| kept.iter().any(|name| stem == OsStr::new(name)));
            let is_old = fs::metadata(&path)?.modified()? < oldest;
            if is_old && !is_kept && path.extension().is_some() {
                remove(&path)?;
                removed += usize::from(path.extension() == Some(OsStr::new("json")));
            }
        }
        Ok(removed)
    }

    fn files(&self) -> io::Result<Vec<PathBuf>> {
        fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.path())).collect()
    }

    fn path(&self, handle: &str, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", name(handle)))
    }
}

/// Writes a file so that after a crash it is the new or the old one, as a whole.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = AtomicWriteFile::options().mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// The name of a job's files, which says nothing about it.
fn name(handle: &str) -> String {
    Sha256::digest(handle).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn read_entry(path: &Path) -> io::Result<Option<Entry>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result?,
    };
    match serde_json::from_slice(&bytes) {
        Ok(entry) => Ok(Some(entry)),
        Err(error) => {
            tracing::error!("the journal's entry {} cannot be read and is put aside: {error}", path.display());
            fs::rename(path, path.with_extension("unreadable"))?;
            Ok(None)
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Stored {
    /// A new answer, given under that lease.
    pub(crate) fn new(answer: Answer, fence: u64) -> Self {
        Self { answer, fence, uploaded: false, delivered: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::JsonText;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    fn job(handle: &str) -> JobMessage {
        JobMessage { input: json!({"a": 1}).into(), task_token: handle.into(), handler: None, input_bytes: None }
    }

    fn stored() -> Stored {
        Stored::new(Answer::Value(json!(57).into()), 3)
    }

    #[test]
    fn a_job_and_its_answer_outlive_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("new/journal");
        let journal = Journal::open(&folder).unwrap();
        let entry = Entry::new(job("t.1"));
        journal.put(&entry).unwrap();
        drop(journal);

        let journal = Journal::open(&folder).unwrap();
        assert_eq!(journal.get("t.1").unwrap(), Some(entry.clone()));
        journal.record("t.1", stored()).unwrap();
        journal.put_result("t.1", b"[1]").unwrap();
        drop(journal);

        let journal = Journal::open(&folder).unwrap();
        let answered = Entry { stored: Some(stored()), ..entry };
        assert_eq!(journal.entries().unwrap(), [answered]);
        assert_eq!(journal.result("t.1").unwrap(), b"[1]");
        journal.remove("t.1").unwrap();
        journal.remove("t.1").unwrap();
        assert_eq!(journal.get("t.1").unwrap(), None);
        assert!(journal.result("t.1").is_err());
    }

    #[test]
    fn what_is_kept_stays_as_it_was() {
        let exact = br#"{"b":117.63331139400017,"a":[123456789012345678901234567890,1.0]}"#;
        let exact = JsonText::parse(exact).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        journal.put(&Entry::new(JobMessage { input: exact.clone(), ..job("t") })).unwrap();
        journal.record("t", Stored::new(Answer::Value(exact.clone()), 1)).unwrap();
        let entry = journal.get("t").unwrap().unwrap();
        assert_eq!((entry.job.input, entry.stored.unwrap().answer), (exact.clone(), Answer::Value(exact)));
    }

    #[test]
    fn a_handle_may_hold_anything_and_is_not_in_the_file_names() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        journal.put(&Entry::new(job("../../secret"))).unwrap();
        assert!(journal.get("../../secret").unwrap().is_some());
        assert!(journal.files().unwrap().iter().all(|path| !path.to_string_lossy().contains("secret")));
    }

    #[test]
    fn what_is_not_known_is_not_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        journal.record("gone", stored()).unwrap();
        assert_eq!(journal.entries().unwrap(), []);
    }

    #[test]
    fn two_workers_do_not_share_a_journal() {
        let folder = tempfile::tempdir().unwrap();
        let first = Journal::open(folder.path()).unwrap();
        let error = Journal::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains("is used by another worker"), "{error}");
        drop(first);
        Journal::open(folder.path()).unwrap();
        let file = folder.path().join("lock");
        assert!(matches!(Journal::open(&file), Err(JournalError::Unusable { .. })));
    }

    #[test]
    fn a_crash_between_two_steps_leaves_the_old_entry() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        journal.put(&Entry::new(job("t"))).unwrap();
        // Half a new entry and half a new result were written, and never took the others' places.
        journal.put_result("t", b"[1]").unwrap();
        for extension in ["json", "result"] {
            let mut file = AtomicWriteFile::open(journal.path("t", extension)).unwrap();
            file.write_all(b"{").unwrap();
            // A process that is killed discards nothing.
            std::mem::forget(file);
        }
        assert_eq!(journal.entries().unwrap().len(), 1);
        assert_eq!(journal.result("t").unwrap(), b"[1]");
        // Who is reading the old one meanwhile reads all of it: the new one takes its place, and is not written into it.
        let mut old = File::open(journal.path("t", "json")).unwrap();
        let length = old.metadata().unwrap().len();
        journal.record("t", stored()).unwrap();
        let mut text = String::new();
        io::Read::read_to_string(&mut old, &mut text).unwrap();
        assert!(text.len() as u64 == length && !text.contains("stored"), "{text}");
        assert_eq!(journal.get("t").unwrap().unwrap().stored, Some(stored()));
        // They go in the end.
        let later = Duration::ZERO;
        journal.prune(later, &["t".to_owned()]).unwrap();
        assert_eq!(journal.files().unwrap().len(), 3, "an entry, a result and the lock");
    }

    #[test]
    fn nobody_else_reads_the_journal() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("journal");
        let journal = Journal::open(&folder).unwrap();
        journal.put(&Entry::new(job("t"))).unwrap();
        journal.put_result("t", b"[1]").unwrap();
        for path in journal.files().unwrap().iter().chain([&folder]) {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o077, 0, "{}", path.display());
        }
    }

    #[test]
    fn an_unreadable_entry_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        journal.put(&Entry::new(job("good"))).unwrap();
        fs::write(journal.path("bad", "json"), "{").unwrap();
        assert_eq!(journal.entries().unwrap().len(), 1);
        assert!(journal.path("bad", "unreadable").exists());
        assert_eq!(journal.get("bad").unwrap(), None);
    }

    #[test]
    fn old_entries_go_unless_they_are_needed() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        let old = SystemTime::now() - Duration::from_hours(48);
        for handle in ["old", "open", "new"] {
            journal.put(&Entry::new(job(handle))).unwrap();
            journal.put_result(handle, b"1").unwrap();
        }
        for handle in ["old", "open"] {
            for extension in ["json", "result"] {
                File::options().write(true).open(journal.path(handle, extension)).unwrap().set_modified(old).unwrap();
            }
        }
        assert_eq!(journal.prune(Duration::from_hours(24), &["open".to_owned()]).unwrap(), 1);
        let left: Vec<_> = journal.entries().unwrap().into_iter().map(|entry| entry.job.task_token).collect();
        assert_eq!(left.len(), 2);
        assert!(left.contains(&"open".to_owned()) && left.contains(&"new".to_owned()));
        assert!(journal.result("old").is_err());
        Journal::open(folder.path()).expect_err("the lock is still there");
    }
}
