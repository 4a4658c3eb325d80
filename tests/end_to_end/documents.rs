//! The commands of README and docs, as a reader gives them to the local cloud: every one that stands in a block, in order, each document
//! in a folder and a shell of its own.
//!
//! What a command needs besides, and why some are left out, is said for each document in [`tables`].

mod tables;

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Parser, Tag, TagEnd};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command as Program, Stdio};
use std::sync::mpsc::{Receiver, channel};
use tables::{DOCUMENTS, Document};
use tests::{Cloud, PATIENCE, ProcessGroup, eventually, saw, terminal};

/// What a block of a document may hold.
const LANGUAGES: [&str; 6] = ["json", "mermaid", "sh", "sql", "text", "toml"];

/// A command of a document.
#[derive(Debug)]
pub(crate) struct Command {
    /// Under which heading of the second level it stands, counted from 0.
    section: usize,
    /// The command itself, of one line or more.
    pub(crate) text: String,
}

/// What stands between fences, and what between backticks in a sentence.
#[derive(Default)]
struct Code {
    /// Section, language and text.
    blocks: Vec<(usize, String, String)>,
    inline: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn code(document: &str) -> Code {
    let markdown = fs::read_to_string(root().join(document)).unwrap_or_else(|error| panic!("{document}: {error}"));
    let (mut code, mut section, mut block) = (Code::default(), 0, None);
    for event in Parser::new(&markdown) {
        match event {
            Event::Start(Tag::Heading { level: HeadingLevel::H2, .. }) => section += 1,
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))) => {
                block = Some((section, language.to_string(), String::new()));
            }
            Event::Text(text) => {
                if let Some((.., content)) = &mut block {
                    content.push_str(&text);
                }
            }
            Event::End(TagEnd::CodeBlock) => code.blocks.extend(block.take()),
            Event::Code(text) => code.inline.push(text.to_string()),
            _ => {}
        }
    }
    code
}

/// The commands of a document's blocks.
pub(crate) fn commands(document: &str) -> Vec<Command> {
    let blocks = code(document).blocks.into_iter().filter(|(_, language, _)| language == "sh");
    blocks.flat_map(|(section, _, text)| split(&text).into_iter().map(move |text| Command { section, text })).collect()
}

/// A block's commands. One ends with the first line after which the shell finds nothing missing: an open quotation mark, an open loop
/// or the end of a text.
fn split(block: &str) -> Vec<String> {
    let (mut found, mut begun) = (Vec::new(), String::new());
    for line in block.lines().filter(|line| !line.is_empty()) {
        begun.push_str(line);
        begun.push('\n');
        if !line.ends_with('\\') && is_complete(&begun) {
            found.push(std::mem::take(&mut begun));
        }
    }
    assert!(begun.is_empty(), "a command without its end: {begun}");
    found
}

fn is_complete(command: &str) -> bool {
    let read = Program::new("bash").args(["-n", "-c", command]).output().expect("bash");
    // A text that does not end is only warned of.
    read.status.success() && read.stderr.is_empty()
}

/// A shell that keeps its variables, functions and folder from command to command.
struct Shell {
    input: ChildStdin,
    statuses: Receiver<String>,
    folder: PathBuf,
    count: usize,
    // The last field: the shell ends when its input has.
    _group: ProcessGroup,
}

impl Shell {
    fn start(folder: &Path) -> Self {
        fs::create_dir_all(folder).expect("a folder");
        let mut bash = terminal(folder, "exec bash --norc -s");
        let mut group = ProcessGroup::start(bash.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let leader = group.leader();
        let (input, output) = (leader.stdin.take().expect("its input"), leader.stdout.take().expect("its output"));
        let (sender, statuses) = channel();
        std::thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { input, statuses, folder: folder.to_owned(), count: 0, _group: group }
    }

    /// A file of a command: what it is, what it prints.
    fn file(&self, extension: &str) -> PathBuf {
        self.folder.join(format!("{:03}.{extension}", self.count))
    }

    /// Has the shell read a command, in the foreground or in the background.
    fn read(&mut self, command: &str, how: &str) {
        self.count += 1;
        let (script, output) = (self.file("sh"), self.file("out"));
        fs::write(&script, command).expect("a script");
        let (script, output) = (script.display(), output.display());
        writeln!(self.input, "source {script} </dev/null >{output} 2>&1 {how}").expect("the shell reads");
    }

    /// Runs a command: whether it has succeeded, and what it has printed.
    fn run(&mut self, command: &str) -> (bool, String) {
        self.read(command, "; echo $?");
        let status = self.statuses.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{command} does not end"));
        (status == "0", fs::read_to_string(self.file("out")).expect("what it has printed"))
    }

    /// The same for a command that must succeed.
    fn must(&mut self, command: &str) -> String {
        let (succeeded, output) = self.run(command);
        assert!(succeeded, "{command} has failed:\n{output}");
        output
    }

    /// Starts a command that goes on until it is stopped.
    fn start_endless(&mut self, command: &str) {
        self.read(&format!("exec {command}"), "& endless+=($!)");
    }

    /// Stops them, all of which must be there still.
    fn stop_endless(&mut self) {
        self.must("gone=; for id in ${endless[@]}; do kill $id || gone=$id; done; wait; endless=(); [ -z \"$gone\" ]");
    }
}

impl Document {
    /// The entry for a command in one of the tables.
    fn entry<T>(table: &'static [(&'static str, T)], command: &str) -> Option<&'static T> {
        table.iter().find(|(part, _)| command.contains(part)).map(|(_, entry)| entry)
    }

    fn is_left_out(&self, command: &str) -> bool {
        Self::entry(self.left_out, command).is_some()
    }

    /// A command with what a reader fills in.
    fn filled_in(&self, command: &str) -> String {
        self.replaced.iter().fold(command.to_owned(), |text, (from, to)| text.replace(from, to))
    }

    /// A shell that has found the local cloud, and what the reader has.
    fn shell(&self) -> Shell {
        let folder = Cloud::folder("documents").join(self.name.replace('/', "-"));
        let mut shell = Shell::start(&folder);
        let run = std::env::var("FLEETFLOW_RUN").expect("a run");
        shell.must(&format!("source '{run}/env'"));
        // The README's function `output`, and what it looks into.
        for command in commands("README.md").iter().filter(|command| command.text.starts_with("output")) {
            shell.must(&command.text);
        }
        shell.must(&format!("printed() {{ cat '{}'/*.out; }}", folder.display()));
        shell.must(tables::HELPERS);
        for command in split(self.prepared) {
            shell.must(&command);
        }
        shell
    }

    /// Runs all commands that are not left out.
    async fn run(&self) {
        let mut shell = self.shell();
        let mut alone = None;
        let commands = commands(self.name);
        let mut section = commands[0].section;
        for command in commands {
            if command.section != section {
                section = command.section;
                shell.stop_endless();
                alone = None;
            }
            if self.is_left_out(&command.text) {
                continue;
            }
            let text = self.filled_in(&command.text);
            if self.endless.iter().any(|part| text.contains(part)) {
                if text.contains("on-premises-worker") {
                    alone = Some(tests::alone("tenant1").await);
                }
                shell.start_endless(&text);
                continue;
            }
            let output = match Self::entry(self.shown, &command.text) {
                None => shell.must(&text),
                Some(shown) => shows(&mut shell, &text, shown).await,
            };
            let hidden = Self::entry(self.hidden, &command.text);
            assert!(!hidden.is_some_and(|hidden| output.contains(hidden)), "{text} shows {hidden:?}:\n{output}");
        }
        shell.stop_endless();
        drop(alone);
    }
}

/// Runs a command until it shows what a reader waits for: what it has printed then.
async fn shows(shell: &mut Shell, command: &str, shown: &str) -> String {
    let shell = std::cell::RefCell::new(shell);
    eventually(&format!("{command} shows {shown}"), || async {
        let (succeeded, output) = shell.borrow_mut().run(command);
        let found = succeeded && output.contains(shown);
        saw(format!("succeeded: {succeeded}, printed: {output}"));
        found.then_some(output)
    })
    .await
}

/// The documents that hold commands, and no others, by their names.
fn document(name: &str) -> &'static Document {
    DOCUMENTS.iter().find(|document| document.name == name).unwrap_or_else(|| panic!("{name} is in no table"))
}

#[test]
fn a_command_ends_where_the_shell_finds_it_whole() {
    let block = "a \\\n  b\nfor x in 1; do\n    c\ndone\ncat > f <<END\nd\nEND\ne 'f\ng'\n";
    let commands = ["a \\\n  b\n", "for x in 1; do\n    c\ndone\n", "cat > f <<END\nd\nEND\n", "e 'f\ng'\n"];
    assert_eq!(split(block), commands);
}

#[test]
fn every_command_of_the_documents_is_run_or_left_out_for_a_reason() {
    let docs = fs::read_dir(root().join("docs")).expect("docs").map(|entry| entry.expect("an entry").path());
    let docs = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let names = docs.map(|path| format!("docs/{}", path.file_name().expect("a name").to_string_lossy()));
    let names: Vec<String> = names.chain(["README.md".to_owned()]).collect();
    for name in &names {
        let code = code(name);
        for (_, language, text) in &code.blocks {
            assert!(LANGUAGES.contains(&language.as_str()), "{name}: of which language ({language:?}) is\n{text}");
        }
        for text in &code.inline {
            let is_whole = ["aws ", "sam ", "cargo run "].iter().any(|program| text.starts_with(program))
                && text.split(" --").skip(1).any(|option| option.contains(' '));
            assert!(!is_whole && !text.contains("$("), "{name}: a command in a sentence is not run: {text}");
        }
    }
    let with_commands: BTreeSet<&str> =
        names.iter().map(String::as_str).filter(|name| !commands(name).is_empty()).collect();
    assert_eq!(with_commands, DOCUMENTS.iter().map(|document| document.name).collect());
}

#[test]
fn every_entry_of_the_tables_is_of_a_command() {
    for document in DOCUMENTS {
        let (left_out, run): (Vec<Command>, Vec<Command>) =
            commands(document.name).into_iter().partition(|command| document.is_left_out(&command.text));
        println!("{}: {} commands are run, {} left out", document.name, run.len(), left_out.len());
        for (part, reason) in document.left_out {
            assert!(
                left_out.iter().any(|command| command.text.contains(part)),
                "{}: no {part} ({reason})",
                document.name
            );
        }
        let parts = document
            .replaced
            .iter()
            .chain(document.shown)
            .chain(document.hidden)
            .map(|(part, _)| part)
            .chain(document.endless);
        for part in parts {
            assert!(run.iter().any(|command| command.text.contains(part)), "{}: no {part}", document.name);
        }
    }
}

/// A test for each document of whose commands some are run.
macro_rules! documents {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[tokio::test]
            #[ignore = "needs the local cloud: cargo xtask test"]
            async fn $test() {
                document($name).run().await;
            }
        )*

        #[test]
        fn documents_with_commands_to_run_have_tests() {
            let tested = BTreeSet::from([$($name),*]);
            let to_run = |document: &&Document| {
                commands(document.name).iter().any(|command| !document.is_left_out(&command.text))
            };
            assert_eq!(tested, DOCUMENTS.iter().filter(to_run).map(|document| document.name).collect());
        }
    };
}

documents! {
    commands_of_the_readme_work: "README.md",
    commands_of_the_first_deployment_work: "docs/first-deployment.md",
    commands_of_the_operations_work: "docs/operations.md",
    commands_of_the_security_work: "docs/security.md",
}
