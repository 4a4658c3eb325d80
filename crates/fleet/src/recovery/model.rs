//! Every order in which park, restore, quarantine, success, release and an operator's edit can meet, with crashes between
//! any two effects and with messages that are delivered again: however they meet, the registry ends as the item says, and no value
//! is lost. What was checked is written to the terminal.

use super::device::{ATTRIBUTES, Device, Limits, Phase, Registered, Step};
use protocol::OperationId;
use protocol::recovery::Failure;
use stateright::{Checker, Model, Property};
use std::io::Write;

const LIMITS: Limits = Limits { attempts: 1, cycles: 2 };
const ORIGINAL: &str = "original";
const EDITED: &str = "edited";

fn failure(number: i64) -> Failure {
    Failure {
        thing_name: "t".parse().unwrap(),
        operation_id: operation(number),
        timestamp: number,
        received_at: number,
        model: None,
        firmware: None,
    }
}

fn operation(number: i64) -> OperationId {
    format!("o-{number}").parse().unwrap()
}

/// What a process does to the item before it makes the registry follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Work {
    /// Park or quarantine: the item has been changed by retry-counter.
    Follow,
    /// That and before it the failure, by its number.
    Fail(i64),
    /// By the number of the failure.
    Restore(i64),
    Succeed(i64),
    Release(i64),
}

/// Where a process is: what it holds in its hands is from the past.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum At {
    Begin,
    ReadRegistry,
    ReadItem(Registered),
    Act(Device, Registered),
    End,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    device: Device,
    registered: Registered,
    processes: Vec<(Work, At)>,
    left: Bounds,
}

/// How often what may happen happens at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Bounds {
    /// Crashes and redeliveries together: either way somebody begins again.
    repeats: u8,
    edits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Go(usize),
    /// The process begins again: it was killed, or what it has done is asked for once more.
    Repeat(usize),
    Edit,
}

struct Recovery {
    /// How many failures there have been.
    failures: i64,
    works: Vec<Work>,
    bounds: Bounds,
}

fn values(value: &str) -> Registered {
    let attributes = ATTRIBUTES.into_iter().map(|name| (name.to_owned(), value.to_owned()));
    Registered { version: 1, attributes: attributes.collect() }
}

impl State {
    fn go(&mut self, process: usize) {
        let (work, at) = self.processes[process].clone();
        self.processes[process].1 = match at {
            At::Begin => {
                self.begin(work);
                At::ReadRegistry
            }
            At::ReadRegistry => At::ReadItem(self.registered.clone()),
            At::ReadItem(registered) => At::Act(self.device.clone(), registered),
            At::Act(device, registered) => self.act(&device, &registered),
            At::End => At::End,
        };
        // Writes are told apart by their content here.
        self.device.revision = 0;
    }

    fn is_over(&self) -> bool {
        self.processes.iter().all(|(_, at)| *at == At::End)
    }

    fn value(&self, name: &str) -> &str {
        &self.registered.attributes[name]
    }

    fn begin(&mut self, work: Work) {
        match work {
            Work::Follow => {}
            Work::Fail(number) => _ = self.device.fail(&failure(number), LIMITS),
            Work::Restore(number) => _ = self.device.restore(&operation(number)),
            Work::Succeed(at) => _ = self.device.succeed(at, 0),
            Work::Release(at) => _ = self.device.release(at),
        }
    }

    fn act(&mut self, device: &Device, registered: &Registered) -> At {
        let Some(held) = &device.held else { return At::End };
        match device.next_step(registered) {
            Step::Done => return At::End,
            Step::Keep(attributes) => self.device.keep(&held.operation_id, &attributes),
            Step::Mark => self.device.mark(&held.operation_id),
            Step::Update { attributes, version } => {
                if self.registered.version == version {
                    self.registered.version += 1;
                    self.registered.attributes.extend(attributes);
                }
            }
        }
        At::ReadRegistry
    }
}

impl Model for Recovery {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut device = Device::default();
        for number in 1..=self.failures {
            device.fail(&failure(number), LIMITS);
        }
        let processes = self.works.iter().map(|work| (*work, At::Begin)).collect();
        vec![State { device, registered: values(ORIGINAL), processes, left: self.bounds }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (process, (_, at)) in state.processes.iter().enumerate() {
            if *at != At::End {
                actions.push(Action::Go(process));
            }
            if state.left.repeats > 0 && *at != At::Begin {
                actions.push(Action::Repeat(process));
            }
        }
        if state.left.edits > 0 {
            actions.push(Action::Edit);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        match action {
            Action::Go(process) => next.go(process),
            Action::Repeat(process) => {
                next.left.repeats -= 1;
                next.processes[process].1 = At::Begin;
            }
            Action::Edit => {
                next.left.edits -= 1;
                next.registered.version += 1;
                next.registered.attributes.insert("FW".to_owned(), EDITED.to_owned());
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a device that is not held has its own attributes", |model: &Self, state: &State| {
                let firmware = if model.bounds.edits > state.left.edits { EDITED } else { ORIGINAL };
                !state.is_over()
                    || state.device.phase != Phase::Active
                    || (state.value("FW") == firmware && state.value("model") == ORIGINAL)
            }),
            Property::always("a device that is held is hidden", |_, state: &State| {
                let hidden = match state.device.phase {
                    Phase::Active => return true,
                    Phase::Parked => "moveOut",
                    Phase::Quarantined => "failedtoupdate",
                };
                let firmware = state.value("FW");
                !state.is_over() || (state.value("model") == hidden && (firmware == hidden || firmware == EDITED))
            }),
            Property::sometimes("it comes to an end", |_, state: &State| state.is_over()),
        ]
    }
}

/// Checks every order of these works, and says how many states that were.
fn check(failures: i64, works: &[Work], bounds: Bounds) -> usize {
    let checker = Recovery { failures, works: works.to_vec(), bounds }.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    checker.unique_state_count()
}

/// Writes past the test harness, which keeps what a test that passes prints.
fn tell(what: &str, bounds: Bounds, states: usize) {
    let Bounds { repeats, edits } = bounds;
    let line = format!(
        "model: recovery, {what}: {states} states, every order, crashes or redeliveries up to {repeats}, edits by an operator up to \
         {edits}: no attribute lost, no device left hidden\n"
    );
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

#[test]
fn a_parking_ends_in_every_way_at_every_moment() {
    let pair = Bounds { repeats: 3, edits: 1 };
    let works = [Work::Restore(1), Work::Succeed(5), Work::Release(5)];
    tell("a parking and its end", pair, works.map(|work| check(1, &[Work::Follow, work], pair)).iter().sum());
    let three = Bounds { repeats: 1, edits: 1 };
    let states = check(1, &[Work::Follow, Work::Restore(1), Work::Succeed(5)], three)
        + check(1, &[Work::Follow, Work::Follow, Work::Restore(1)], three);
    tell("a parking and two others at once", three, states);
}

#[test]
fn a_quarantine_that_begins_while_the_parking_still_ends() {
    let bounds = Bounds { repeats: 1, edits: 1 };
    let states = check(1, &[Work::Follow, Work::Restore(1), Work::Fail(2)], bounds)
        + check(1, &[Work::Restore(1), Work::Fail(2), Work::Release(5)], bounds);
    tell("a quarantine while a parking ends", bounds, states);
}
