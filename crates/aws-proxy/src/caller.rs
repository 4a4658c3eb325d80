//! Who calls: the Lambda function whose process is at the other end of a connection.

use std::fs;
use std::path::Path;

/// A Lambda function's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The function's name.
    pub(crate) function: String,
    pub(crate) pid: i32,
}

impl Caller {
    /// The function that connects from that port of this machine. `None` if it is another program, or where the system has no
    /// `/proc`.
    pub(crate) fn of_port(port: u16) -> Option<Self> {
        let socket = format!("socket:[{}]", inode(port)?);
        let processes = fs::read_dir("/proc").ok()?.flatten();
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find_map(|pid: i32| {
            let function = function(pid)?;
            holds(pid, &socket).then_some(Self { function, pid })
        })
    }
}

/// The socket whose own end is that port (`man 5 proc_net`): the second field is its address, the tenth its inode.
fn inode(port: u16) -> Option<String> {
    let ending = format!(":{port:04X}");
    let socket = |table: &str| {
        let text = fs::read_to_string(table).ok()?;
        let line =
            text.lines().skip(1).find(|line| line.split_whitespace().nth(1).is_some_and(|at| at.ends_with(&ending)))?;
        line.split_whitespace().nth(9).map(str::to_owned)
    };
    socket("/proc/net/tcp").or_else(|| socket("/proc/net/tcp6"))
}

fn function(pid: i32) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut variables = environment.split(|byte| *byte == 0);
    let name = variables.find_map(|line| line.strip_prefix(b"AWS_LAMBDA_FUNCTION_NAME="))?;
    String::from_utf8(name.to_vec()).ok()
}

fn holds(pid: i32, socket: &str) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| fs::read_link(file.path()).ok()).any(|target| target == Path::new(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};
    use std::process::{Command, Stdio};

    #[test]
    #[cfg(target_os = "linux")]
    fn a_function_is_found_by_its_connection_and_another_program_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let connect = || TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        let (ours, theirs) = (connect(), connect());
        let port = theirs.local_addr().expect("an address").port();
        // A child that holds the connection as its standard input.
        let input: OwnedFd = theirs.as_fd().try_clone_to_owned().expect("a copy");
        drop(theirs);
        let mut child = Command::new("sleep");
        child.arg("60").env("AWS_LAMBDA_FUNCTION_NAME", "create-job").stdin(Stdio::from(input));
        let mut child = child.spawn().expect("a child");
        let pid = i32::try_from(child.id()).expect("an id");
        assert_eq!(Caller::of_port(port), Some(Caller { function: "create-job".into(), pid }));
        assert_eq!(Caller::of_port(ours.local_addr().expect("an address").port()), None);
        child.kill().and_then(|()| child.wait()).expect("ended");
    }
}
