//! Work on one function as the README has it: its commands as they stand, on a copy of the checkout, and an edit.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tests::{Cloud, ProcessGroup, eventually, saw, terminal};

/// What a copy does without: what is built, and what Git and the local cloud keep.
const LEFT_OUT: [&str; 3] = ["target", ".git", ".fleetflow"];
/// Where `cargo lambda watch` listens, without a word from the README.
const ADDRESS: &str = "127.0.0.1:9000";

/// Starts the local cloud, watches, invokes.
struct Commands {
    watch: String,
    invoke: String,
}

impl Commands {
    /// Those of the README; the local cloud is up already.
    fn of_readme() -> Self {
        let found: Vec<String> =
            crate::documents::commands("README.md").into_iter().map(|command| command.text).collect();
        let of =
            |part: &str| found.iter().find(|text| text.contains(part)).unwrap_or_else(|| panic!("no {part}")).clone();
        Self { watch: of("cargo lambda watch --"), invoke: of("cargo lambda invoke ") }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if LEFT_OUT.iter().any(|name| entry.file_name() == *name) {
        } else if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).expect("a copy");
        }
    }
}

/// A copy of the checkout whose dependencies are built, and whose local cloud is the tests'.
fn checkout(folder: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let checkout = folder.join("checkout");
    copy(root, &checkout);
    link_target(&checkout.join("target/debug"));
    // Not a link to the run, which holds the copy: the watcher would go round in circles.
    let (run, current) = (std::env::var("FLEETFLOW_RUN").expect("a run"), checkout.join(".fleetflow/current"));
    fs::create_dir_all(&current).expect("a folder");
    for file in ["env", "functions.env"] {
        fs::copy(Path::new(&run).join(file), current.join(file)).expect("what the local cloud has written");
    }
    checkout
}

/// Gives the copy what is built already. Libraries and programs are gigabytes, and replaced rather than changed when they are built
/// anew, so they are linked; Cargo's notes are changed, so they are copied.
fn link_target(target: &Path) {
    // This program is in `deps` of the profile's folder.
    let built = std::env::current_exe().expect("this program").ancestors().nth(2).expect("target/debug").to_owned();
    fs::create_dir_all(target).expect("a folder");
    for (option, part) in [("-al", "deps"), ("-al", "build"), ("-a", ".fingerprint")] {
        let copied = Command::new("cp").arg(option).arg(built.join(part)).arg(target).status();
        assert!(copied.expect("cp").success(), "{part} is copied");
    }
    for entry in fs::read_dir(target.join("deps")).expect("deps") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "d") {
            let notes = fs::read(&path).expect("notes");
            fs::remove_file(&path).and_then(|()| fs::write(&path, notes)).expect("notes of its own");
        }
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_function_is_watched_invoked_and_edited_as_the_readme_says() {
    assert!(std::net::TcpStream::connect(ADDRESS).is_err(), "{ADDRESS} is taken: by another `cargo lambda watch`?");
    let cloud = Cloud::connect().await;
    let folder = Cloud::folder("watch");
    let checkout = checkout(&folder);
    let commands = Commands::of_readme();
    let image = cloud.upload("2.0.0", 1000).await;
    let payload = |target: &str| {
        let payload = json!({
            "firmwareVersion": "2.0.0", "upgradeTrigger": "manual", "targetArn": target, "artifact": image.artifact,
        });
        fs::write(checkout.join("upgrade.json"), payload.to_string()).expect("a payload");
    };
    payload(cloud.output("ThingGroupArn"));

    // Its log is elsewhere: whatever changes in the checkout has the function built.
    let log = fs::File::create(folder.join("watch.log")).expect("a log");
    let mut watch = terminal(&checkout, &commands.watch);
    watch.stdout(log.try_clone().expect("a log")).stderr(log);
    let watching = ProcessGroup::start(&mut watch);
    let invoke = || terminal(&checkout, &commands.invoke).output().expect("cargo lambda invoke");
    let watched = || fs::read_to_string(folder.join("watch.log")).unwrap_or_default();
    let answer = eventually("create-job answers", || async {
        let output = invoke();
        saw(format!("{}\n{}", text(&output), watched()));
        serde_json::from_slice::<Value>(&output.stdout).ok().filter(|answer| answer["jobId"].is_string())
    });
    let answer = answer.await;
    let job = cloud.iot.describe_job().job_id(answer["jobId"].as_str().expect("an id")).send().await.expect("the job");
    assert_eq!(job.job.expect("a job").job_arn.as_deref(), answer["jobArn"].as_str(), "{}", watched());

    let source = checkout.join("crates/fleet/src/jobs/create_job.rs");
    let code = fs::read_to_string(&source).expect("the source");
    let edited = code.replace("the ARN of a thing or thing group", "an EDITED sentence");
    assert_ne!(code, edited);
    fs::write(&source, edited).expect("the edit");
    payload("nothing");
    eventually("the edited function answers", || async {
        let answer = text(&invoke());
        saw(format!("{answer}\n{}", watched()));
        answer.contains("EDITED").then_some(())
    })
    .await;
    drop(watching);
    fs::remove_dir_all(&checkout).expect("the copy is removed");
}
