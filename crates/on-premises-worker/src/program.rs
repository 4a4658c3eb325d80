//! Running a program on a job's input: bounded in time and output, and with all of its children.

use crate::config::Program;
use crate::stderr::{self, Tail};
use crate::{Failure, GRACE, Outcome, beginning};
use protocol::JsonText;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use serde_json::Value;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::{select, time};
use tracing::Instrument;

/// How long what a program has written may take to arrive once it is gone. Children that have left its process group
/// could hold the pipes for ever.
const PIPE_GRACE: Duration = Duration::from_secs(2);
/// How often it is looked whether a program that was told to end has done so.
const LOOK: Duration = Duration::from_millis(20);
/// The longest name of an exception that Step Functions takes, in characters
/// (<https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskFailure.html>).
const EXCEPTION_BYTES: usize = 256;
/// So much of a cause is passed on: an answer must fit into a message.
const CAUSE_BYTES: usize = 16 * 1024;

/// How a run came to its end.
enum Ending {
    Exited(io::Result<ExitStatus>),
    OutputTooLarge,
    TimedOut,
    /// It is to be gone within this time.
    Stopped(Duration),
}

/// Runs a program; returns nothing if it was stopped, which it is when `stop` is ready: that says how long it may take to end.
pub(crate) async fn run(
    program: &Program,
    input: &JsonText,
    on_progress: impl Fn(u8) + Send + 'static,
    stop: impl Future<Output = Duration>,
) -> Option<Outcome> {
    let (mut child, group) = match start(program) {
        Ok(started) => started,
        Err(cause) => return Some(Err(Failure::new("ProgramUnavailable", cause))),
    };
    let mut pipes = Pipes::new(&mut child, input, program.output_limit, on_progress);
    let output = Arc::clone(&pipes.output);
    let mut stop = pin!(stop);
    let ending = select! {
        biased;
        status = child.wait() => Ending::Exited(status),
        () = output.exceeded.notified() => Ending::OutputTooLarge,
        grace = &mut stop => Ending::Stopped(grace),
        () = time::sleep(program.timeout) => Ending::TimedOut,
    };
    match ending {
        Ending::Exited(_) => {}
        Ending::Stopped(grace) => group.end(&mut child, grace).await,
        Ending::OutputTooLarge | Ending::TimedOut => select! {
            () = group.end(&mut child, GRACE) => {}
            grace = &mut stop => group.end(&mut child, grace).await,
        },
    }
    // What the program has started ends with it, and what has not heeded SIGTERM.
    drop(group);
    let _ = child.wait().await;
    pipes.finish().await;
    let stderr = pipes.tail.text();
    let failed = |exception: &str, cause: String| Some(Err(Failure::new(exception, with_stderr(cause, &stderr))));
    match ending {
        Ending::Stopped(_) => None,
        Ending::TimedOut => {
            let limit = humantime::format_duration(program.timeout);
            failed("ProgramTimedOut", format!("the program ran longer than {limit}"))
        }
        Ending::Exited(Err(error)) => failed("ProgramFailed", format!("the program's end is not known: {error}")),
        _ if output.is_too_large() => {
            failed("OutputTooLarge", format!("the program wrote more than {} bytes", program.output_limit))
        }
        Ending::OutputTooLarge => failed("OutputTooLarge", "the program wrote too much".to_owned()),
        Ending::Exited(Ok(status)) => Some(outcome(status, &output.bytes(), &stderr)),
    }
}

/// A process and those that it has started. Dropping this kills them.
struct Group(Option<Pid>);

impl Group {
    /// Tells all of them to end (SIGTERM), and waits for that, but not longer than `grace`.
    async fn end(&self, child: &mut Child, grace: Duration) {
        let Some(group) = self.0 else { return };
        // An error means that all of them are gone.
        let _ = kill_process_group(group, Signal::TERM);
        let gone = async {
            let _ = child.wait().await;
            while test_kill_process_group(group).is_ok() {
                time::sleep(LOOK).await;
            }
        };
        // Who is still there is killed.
        let _ = time::timeout(grace, gone).await;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // An error means that all of them are gone.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

fn start(program: &Program) -> Result<(Child, Group), String> {
    let path = program.locate()?;
    let environment = program.environment.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let child = Command::new(&path)
        .args(&program.arguments)
        .env_clear()
        .envs(environment)
        .current_dir(&program.folder)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{} cannot be started in {}: {error}", path.display(), program.folder.display()))?;
    let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    Ok((child, Group(id)))
}

/// What a program has written to stdout.
struct Output {
    limit: usize,
    bytes: Mutex<Vec<u8>>,
    /// Told once there is more than the limit.
    exceeded: Notify,
}

impl Output {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_too_large(&self) -> bool {
        self.bytes().len() > self.limit
    }

    async fn read(&self, mut stdout: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = stdout.read(&mut buffer).await {
            self.bytes().extend_from_slice(&buffer[..length]);
            if self.is_too_large() {
                return self.exceeded.notify_one();
            }
        }
    }
}

/// The tasks at a program's pipes, which end with this.
struct Pipes {
    output: Arc<Output>,
    tail: Tail,
    stdin: JoinHandle<()>,
    stdout: JoinHandle<()>,
    stderr: JoinHandle<()>,
}

impl Pipes {
    fn new(child: &mut Child, input: &JsonText, limit: usize, on_progress: impl Fn(u8) + Send + 'static) -> Self {
        let output = Arc::new(Output { limit, bytes: Mutex::default(), exceeded: Notify::new() });
        let (tail, input) = (Tail::default(), input.to_string());
        let stdin = tokio::spawn(write(child.stdin.take(), input.into_bytes()));
        let stdout = tokio::spawn(read_stdout(child.stdout.take(), Arc::clone(&output)));
        let stderr = tokio::spawn(read_stderr(child.stderr.take(), tail.clone(), on_progress).in_current_span());
        Self { output, tail, stdin, stdout, stderr }
    }

    /// Waits for what is still in the pipes, but not for ever.
    async fn finish(&mut self) {
        self.stdin.abort();
        let both = async { (&mut self.stdout).await.and((&mut self.stderr).await) };
        // What came so far is what there is.
        let _ = time::timeout(PIPE_GRACE, both).await;
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        for task in [&self.stdin, &self.stdout, &self.stderr] {
            task.abort();
        }
    }
}

async fn write(stdin: Option<ChildStdin>, input: Vec<u8>) {
    if let Some(mut stdin) = stdin {
        // A program need not read its input.
        let _ = stdin.write_all(&input).await;
    }
}

async fn read_stdout(stdout: Option<ChildStdout>, output: Arc<Output>) {
    if let Some(stdout) = stdout {
        output.read(stdout).await;
    }
}

async fn read_stderr(stderr: Option<ChildStderr>, tail: Tail, on_progress: impl Fn(u8)) {
    if let Some(stderr) = stderr {
        stderr::read(stderr, tail, on_progress).await;
    }
}

fn outcome(status: ExitStatus, stdout: &[u8], stderr: &str) -> Outcome {
    if status.success() {
        return result(stdout).map_err(|why| Failure::new("InvalidOutput", with_stderr(why, stderr)));
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    };
    let named = serde_json::from_slice(protocol::trimmed(stdout)).ok().and_then(|output| named_failure(&output));
    Err(named.unwrap_or_else(|| Failure::new("ProgramFailed", with_stderr(how, stderr))))
}

/// What a program has written, as it stands there. The cloud reads nothing that is nested deeper.
fn result(stdout: &[u8]) -> Result<JsonText, String> {
    let stdout = protocol::trimmed(stdout);
    protocol::check_depth(stdout).map_err(|error| format!("the program's output: {error}"))?;
    JsonText::parse(stdout).map_err(|error| format!("the program wrote no JSON to stdout: {error}"))
}

/// The failure that a program has named itself.
fn named_failure(output: &Value) -> Option<Failure> {
    let exception = output.get("exception")?.as_str().filter(|exception| !exception.trim().is_empty())?;
    let cause = match output.get("cause") {
        None | Some(Value::Null) => None,
        Some(Value::String(cause)) => Some(beginning(cause, CAUSE_BYTES).to_owned()),
        Some(other) => Some(beginning(&other.to_string(), CAUSE_BYTES).to_owned()),
    };
    Some(Failure { exception: beginning(exception, EXCEPTION_BYTES).to_owned(), cause })
}

fn with_stderr(cause: String, stderr: &str) -> String {
    if stderr.is_empty() { cause } else { format!("{cause}: {stderr}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::future::pending;
    use std::path::Path;
    use std::time::Instant;

    fn sh(script: &str) -> Program {
        Program {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            timeout: Duration::from_secs(30),
            output_limit: 1000,
            environment: vec!["PATH".into()],
            folder: "/".into(),
        }
    }

    async fn outcome_of(program: &Program) -> Outcome {
        run(program, &json!({"a": 1}).into(), |_| {}, pending()).await.expect("an outcome")
    }

    async fn failure_of(program: &Program) -> (String, String) {
        let failure = outcome_of(program).await.unwrap_err();
        (failure.exception, failure.cause.unwrap_or_default())
    }

    fn is_alive(id: &str) -> bool {
        // Zombies are as good as gone: whoever has inherited them has not looked yet.
        let status = std::fs::read_to_string(format!("/proc/{}/stat", id.trim())).unwrap_or_default();
        !status.is_empty() && !status.contains(") Z ")
    }

    async fn until(mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "it did not happen");
            time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn the_result_is_what_the_program_writes() {
        assert_eq!(outcome_of(&sh("cat")).await, Ok(json!({"a": 1}).into()));
        let large: JsonText = json!("x".repeat(1 << 20)).into();
        let program = Program { output_limit: 2 << 20, ..sh("cat") };
        assert_eq!(run(&program, &large, |_| {}, pending()).await, Some(Ok(large)));
    }

    #[tokio::test]
    async fn numbers_come_back_as_they_went() {
        for exact in [
            r#"{"a":117.63331139400017,"b":0}"#,
            r#"{"z":[123456789012345678901234567890,-9223372036854775809],"a":1.0}"#,
            r#"{"b":1E400,"a":0.10,"c":-0}"#,
        ] {
            let input = JsonText::parse(exact.as_bytes()).unwrap();
            let output = run(&sh("cat"), &input, |_| {}, pending()).await.unwrap().unwrap();
            assert_eq!(output.get(), exact);
        }
    }

    /// A shell that waits for its child, which cleans up before it goes.
    const TIDY: &str =
        "sh -c 'trap \"echo tidy > {0}; exit 0\" TERM; echo > {0}.begun; while :; do sleep 0.01; done' & wait";

    #[tokio::test]
    async fn a_program_may_clean_up_before_it_is_killed() {
        for is_stopped in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let (tidy, begun) = (folder.path().join("tidy"), folder.path().join("tidy.begun"));
            let script = TIDY.replace("{0}", &tidy.display().to_string());
            let timeout = if is_stopped { Duration::from_secs(30) } else { Duration::from_millis(500) };
            let stop = async {
                until(|| begun.exists()).await;
                if is_stopped { GRACE } else { pending().await }
            };
            let outcome = run(&Program { timeout, ..sh(&script) }, &JsonText::null(), |_| {}, stop).await;
            assert_eq!(outcome.is_none(), is_stopped, "{outcome:?}");
            assert_eq!(std::fs::read_to_string(tidy).unwrap(), "tidy\n");
        }
    }

    #[tokio::test]
    async fn a_program_that_does_not_heed_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("child");
        let script =
            format!("trap '' TERM; echo $$ > {0}.new; mv {0}.new {0}; while :; do sleep 0.01; done", file.display());
        for grace in [Duration::from_millis(50), Duration::ZERO] {
            let _ = std::fs::remove_file(&file);
            let stop = async {
                until(|| file.exists()).await;
                grace
            };
            assert_eq!(run(&sh(&script), &JsonText::null(), |_| {}, stop).await, None);
            assert!(!is_alive(&std::fs::read_to_string(&file).unwrap()));
        }
    }

    #[tokio::test]
    async fn a_program_need_not_read_its_input() {
        let large = json!("x".repeat(1 << 20)).into();
        for script in ["exec <&-; echo 1", "echo 1"] {
            assert_eq!(run(&sh(script), &large, |_| {}, pending()).await, Some(Ok(json!(1).into())), "{script}");
        }
    }

    #[tokio::test]
    async fn a_program_can_name_its_failure() {
        for (script, exception, cause) in [
            (r#"echo '{"exception":"KeyError","cause":"no a"}'; exit 1"#, "KeyError", "no a"),
            (r#"echo '{"exception":"KeyError"}'; exit 1"#, "KeyError", ""),
            (r#"echo '{"exception":"Odd","cause":{"x":1}}'; exit 1"#, "Odd", r#"{"x":1}"#),
            (r#"echo '{"exception":""}'; exit 1"#, "ProgramFailed", "exit code 1"),
            ("echo to stderr >&2; exit 3", "ProgramFailed", "exit code 3: to stderr"),
            ("kill -SEGV $$", "ProgramFailed", "killed by signal 11"),
        ] {
            assert_eq!(failure_of(&sh(script)).await, (exception.to_owned(), cause.to_owned()), "{script}");
        }
    }

    #[tokio::test]
    async fn what_is_no_json_is_no_result() {
        for script in ["echo hello", "true", "echo 1 2", "echo NaN"] {
            let (exception, cause) = failure_of(&sh(script)).await;
            assert_eq!(exception, "InvalidOutput", "{script}");
            assert!(cause.starts_with("the program wrote no JSON to stdout"), "{cause}");
        }
        let deep = format!("echo '{}{}'", "[".repeat(65), "]".repeat(65));
        let (exception, cause) = failure_of(&sh(&deep)).await;
        assert!(exception == "InvalidOutput" && cause.contains("nested deeper"), "{cause}");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("child");
        let script = format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
        let program = Program { timeout: Duration::from_millis(500), ..sh(&script) };
        let (exception, cause) = failure_of(&program).await;
        assert_eq!((exception.as_str(), cause.as_str()), ("ProgramTimedOut", "the program ran longer than 500ms"));
        let child = std::fs::read_to_string(file).unwrap();
        until(|| !is_alive(&child)).await;
    }

    #[tokio::test]
    async fn a_program_that_is_stopped_has_no_outcome() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("child");
        let script = format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
        let stop = async {
            until(|| file.exists()).await;
            GRACE
        };
        assert_eq!(run(&sh(&script), &JsonText::null(), |_| {}, stop).await, None);
        let child = std::fs::read_to_string(&file).unwrap();
        until(|| !is_alive(&child)).await;
    }

    #[tokio::test]
    async fn a_run_that_is_given_up_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("child");
        let script = format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
        let task = tokio::spawn(async move { outcome_of(&sh(&script)).await });
        until(|| file.exists()).await;
        task.abort();
        let child = std::fs::read_to_string(&file).unwrap();
        until(|| !is_alive(&child)).await;
    }

    #[tokio::test]
    async fn children_that_stay_do_not_hold_the_job() {
        // One in the program's group, one that has left it.
        assert_eq!(outcome_of(&sh("sleep 1000 & echo 1")).await, Ok(json!(1).into()));
        let begin = Instant::now();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("child");
        let script = format!(
            "setsid sh -c 'echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000' & \
             while ! [ -e {0} ]; do sleep 0.01; done; echo 2",
            file.display()
        );
        assert_eq!(outcome_of(&sh(&script)).await, Ok(json!(2).into()));
        assert!(begin.elapsed() < Duration::from_secs(20));
        let child: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(child).unwrap(), Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn a_flood_of_output_ends_the_program() {
        for script in ["yes", "yes | head -c 1001", "yes >&2 & yes"] {
            let (exception, cause) = failure_of(&sh(script)).await;
            assert_eq!(exception, "OutputTooLarge", "{script}");
            assert!(cause.starts_with("the program wrote more than 1000 bytes"), "{cause}");
        }
    }

    #[tokio::test]
    async fn a_flood_of_stderr_is_bounded() {
        assert_eq!(outcome_of(&sh("yes | head -c 5000000 >&2; echo 1")).await, Ok(json!(1).into()));
        let (_, cause) = failure_of(&sh("yes | tr -d '\\n' | head -c 5000000 >&2; exit 1")).await;
        assert!(cause.starts_with("exit code 1: yyy") && cause.len() < 5000, "{}", cause.len());
    }

    #[tokio::test]
    async fn only_named_variables_are_passed_on() {
        let program = Program { environment: vec!["PATH".into(), "NOT_SET".into()], ..sh("env >&2; exit 1") };
        let (_, cause) = failure_of(&program).await;
        let inherited = |line: &&str| !["PWD=", "SHLVL=", "_=", "OLDPWD="].iter().any(|own| line.starts_with(own));
        let names: Vec<_> = cause.trim_start_matches("exit code 1: ").lines().filter(inherited).collect();
        assert!(names.len() == 1 && names[0].starts_with("PATH="), "{names:?}");
    }

    #[tokio::test]
    async fn progress_is_told() {
        let percents = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&percents);
        let on_progress = move |percent| seen.lock().unwrap().push(percent);
        let script = "echo progress: 10 >&2; echo progress: 90 >&2; echo 1";
        assert_eq!(run(&sh(script), &JsonText::null(), on_progress, pending()).await, Some(Ok(json!(1).into())));
        assert_eq!(*percents.lock().unwrap(), [10, 90]);
    }

    #[tokio::test]
    async fn it_runs_in_its_folder_and_is_found_through_path() {
        let folder = tempfile::tempdir().unwrap();
        let program = Program { program: "sh".into(), folder: folder.path().to_owned(), ..sh("touch here; echo 1") };
        assert_eq!(outcome_of(&program).await, Ok(json!(1).into()));
        assert!(folder.path().join("here").exists());
    }

    #[tokio::test]
    async fn what_cannot_be_started_is_named() {
        let missing = Program { program: "/nonexistent/x".into(), ..sh("") };
        let nowhere = Program { folder: "/nonexistent".into(), ..sh("") };
        for (program, part) in [(missing, "/nonexistent/x is no executable file"), (nowhere, "in /nonexistent: ")] {
            let (exception, cause) = failure_of(&program).await;
            assert_eq!(exception, "ProgramUnavailable");
            assert!(cause.contains(part), "{cause}");
        }
        assert!(Path::new("/bin/sh").exists());
    }
}
