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
    /// The function that connects from that port of this machine to that other one. `None` if it is another program, or where the
    /// system has no `/proc`.
    pub(crate) fn of_connection(from: u16, to: u16) -> Option<Self> {
        let socket = format!("socket:[{}]", inode(from, to)?);
        let processes = fs::read_dir("/proc").ok()?.flatten();
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find_map(|pid: i32| {
            let function = function(pid)?;
            holds(pid, &socket).then_some(Self { function, pid })
        })
    }
}

/// The socket of a connection (`man 5 proc_net`): the second field is its own address, the third the other one's, the tenth its
/// inode. The same port may have connections to several others.
fn inode(from: u16, to: u16) -> Option<String> {
    let (from, to) = (format!(":{from:04X}"), format!(":{to:04X}"));
    let socket = |table: &str| {
        let text = fs::read_to_string(table).ok()?;
        text.lines().skip(1).find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let is_it = fields.get(1)?.ends_with(&from) && fields.get(2)?.ends_with(&to);
            fields.get(9).filter(|_| is_it).map(|inode| (*inode).to_owned())
        })
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
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};
    use tokio::net::TcpSocket;

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        (listener, address)
    }

    /// A connection from that port, or from any.
    async fn connect(from: u16, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("a port that is used already");
        socket.bind(([127, 0, 0, 1], from).into()).expect("the port");
        socket.connect(to).await.and_then(tokio::net::TcpStream::into_std).expect("connected")
    }

    #[tokio::test]
    #[cfg(target_os = "linux")]
    async fn a_function_is_found_by_its_connection_and_another_program_is_none() {
        let ((_one, proxy), (_other, elsewhere)) = (listener(), listener());
        let theirs = connect(0, proxy).await;
        let from = theirs.local_addr().expect("an address").port();
        // From the same port, as the system lets it when the destinations differ.
        let _ours = connect(from, elsewhere).await;
        // A child that holds the connection as its standard input.
        let mut child = Command::new("sleep");
        child.arg("60").env("AWS_LAMBDA_FUNCTION_NAME", "create-job").stdin(Stdio::from(OwnedFd::from(theirs)));
        let mut child = child.spawn().expect("a child");
        let pid = i32::try_from(child.id()).expect("an id");
        let caller = Caller { function: "create-job".into(), pid };
        assert_eq!(Caller::of_connection(from, proxy.port()), Some(caller));
        assert_eq!(Caller::of_connection(from, elsewhere.port()), None);
        child.kill().and_then(|()| child.wait()).expect("ended");
    }
}
