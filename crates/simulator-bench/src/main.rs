//! Runs the device simulator, a process of its own, against an embedded broker over mutual TLS, and prints for each size of the
//! fleet how long its connections take, what memory it has and how many messages a second come through, as a line of JSON.

mod broker;
mod certificates;
mod limit;
mod simulator;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use crate::broker::Broker;
use crate::certificates::{Folder, thing};
use crate::simulator::Simulator;

/// How many commands each device answers. The same for all fleets: a device remembers them.
const COMMANDS: usize = 20;
/// Of so many devices the broker learns the topics together.
const TOPICS_AT_ONCE: usize = 50;
/// Devices that hear nothing for so long are not all there.
const SILENCE: Duration = Duration::from_mins(1);
/// After it nothing of the handshakes is under way any more.
const REST: Duration = Duration::from_secs(2);

#[derive(Parser)]
struct Options {
    /// The simulator's program.
    #[arg(long)]
    simulator: PathBuf,
    /// For certificates and logs; must not be there.
    #[arg(long)]
    folder: PathBuf,
    /// For the devices' state; must not be there.
    #[arg(long)]
    state: PathBuf,
    /// How many devices; the first is what the memory of the others is compared with.
    #[arg(required = true)]
    devices: Vec<usize>,
}

/// What was measured of a fleet.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Measured {
    devices: usize,
    /// From the start of the process until each device is subscribed.
    connect_seconds: f64,
    /// Of the process, in KiB, when all are connected.
    connected_memory: u64,
    /// The same after the messages.
    memory: u64,
    /// The most that it ever was.
    peak_memory: u64,
    messages: usize,
    messages_per_second: f64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let largest = options.devices.iter().copied().max().unwrap_or_default();
    limit::allow_connections(largest)?;
    eprintln!("certificates of {largest} devices");
    let folder = Folder::create(&options.folder, &options.state, largest)?;
    for devices in &options.devices {
        let measured = measure(&options.simulator, &folder, *devices);
        let measured = measured.with_context(|| format!("{devices} devices cannot be measured"))?;
        println!("{}", serde_json::to_string(&measured)?);
    }
    Ok(())
}

fn measure(program: &Path, folder: &Folder, devices: usize) -> Result<Measured> {
    eprintln!("{devices} devices connect");
    // Another broker for each: what one keeps of devices that have gone shall not slow the next ones down.
    let mut broker = Broker::start(folder, devices)?;
    let begin = Instant::now();
    let mut simulator = Simulator::start(program, folder, broker.port, devices)?;
    simulator.connected(SILENCE * 5)?;
    let connect_seconds = begin.elapsed().as_secs_f64();
    std::thread::sleep(REST);
    let connected_memory = simulator.memory("VmRSS")?;
    // A broker that does not know a topic yet compares it with every subscription. That is not what is measured, and a few
    // devices at a time leave it time for the others' keep-alive.
    eprintln!("{devices} devices answer");
    for first in (0..devices).step_by(TOPICS_AT_ONCE) {
        exchange(&mut broker, first..devices.min(first + TOPICS_AT_ONCE), 1)?;
    }
    let (messages, seconds) = exchange(&mut broker, 0..devices, COMMANDS)?;
    std::thread::sleep(REST);
    let [memory, peak_memory] = [simulator.memory("VmRSS")?, simulator.memory("VmHWM")?];
    #[expect(clippy::cast_precision_loss, reason = "there are not that many")]
    let messages_per_second = messages as f64 / seconds;
    Ok(Measured { devices, connect_seconds, connected_memory, memory, peak_memory, messages, messages_per_second })
}

/// Sends each of these devices so many settings, the next when it has answered the last; how many messages went, and in what time.
fn exchange(broker: &mut Broker, devices: Range<usize>, rounds: usize) -> Result<(usize, f64)> {
    let begin = Instant::now();
    let commands = devices.len() * rounds;
    let mut left = vec![rounds - 1; devices.end];
    for device in devices {
        broker.send_setting(&thing(device))?;
    }
    for answers in 0..commands {
        let answer = broker.next_answer(SILENCE).with_context(|| format!("{answers} have answered"))?;
        let left = certificates::index(&answer).and_then(|device| left.get_mut(device));
        let left = left.with_context(|| format!("{answer} was not asked"))?;
        if *left > 0 {
            *left -= 1;
            broker.send_setting(&answer)?;
        }
    }
    Ok((2 * commands, begin.elapsed().as_secs_f64()))
}
