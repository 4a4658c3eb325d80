//! The program of the proxy; see the library.

use anyhow::{Context, Result};
use clap::Parser;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::net::TcpListener;

/// Stands before a local cloud: counts the calls of the AWS APIs, and disturbs them on request.
#[derive(Parser)]
struct Cli {
    /// A port of this machine, and the port behind it (may be repeated).
    #[arg(long = "forward", value_name = "PORT:PORT", required = true, value_parser = ports)]
    forward: Vec<(u16, u16)>,
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let parse = |port: &str| port.parse().map_err(|_| format!("{port:?} is no port"));
    let (front, behind) = text.split_once(':').ok_or_else(|| format!("{text:?} is not PORT:PORT"))?;
    Ok((parse(front)?, parse(behind)?))
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let mut forwards = Vec::new();
    for (front, behind) in cli.forward {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, front)).await;
        let listener = listener.with_context(|| format!("port {front} cannot be used"))?;
        forwards.push((listener, SocketAddr::from((Ipv4Addr::LOCALHOST, behind))));
    }
    aws_proxy::serve(forwards).await
}
